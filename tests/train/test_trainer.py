"""The training loop: a killed run goes on bit by bit, and every recipe trains, saves and loads at a tiny size."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import TINY, curve, written
from torch import Tensor, nn

from scaleweaver import VARControlPipeline
from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.toybox.store import cache_renders
from scaleweaver.train import run
from scaleweaver.train.backbone import BackboneRecipe
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.data import Renders, as_pixels, cached_latents, shuffled, to_images
from scaleweaver.train.judge import JudgeRecipe
from scaleweaver.train.tokenizer import TokenizerRecipe
from scaleweaver.train.trainer import TrainConfig, train


class Kill(Exception):
    """Stands for what ends a run in between."""


class Noisy:
    """A recipe of a small network with drop-out and noise of its own, which ends at batch `kill`."""

    def __init__(self, kill: int | None = None):
        torch.manual_seed(0)
        self.model: nn.Module = NoisyLoss()
        self.kill = kill
        self.validated: list[tuple[bool, bool]] = []

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        first, second = self.model.first, self.model.second
        return [{"params": first.parameters(), "lr_scale": 0.5}, {"params": second.parameters(), "weight_decay": 0.1}]

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        if index == self.kill:
            raise Kill
        return {"x": torch.from_numpy(np.random.default_rng(index).normal(size=(size, 4))).float()}

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        self.validated.append((self.model.first.training, self.model.frozen.training))
        return {"weight": float(self.model.second.weight.detach().sum())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.clone() for k, v in self.model.state_dict().items()}, folder / "model.pt")


class NoisyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 8), nn.Linear(8, 1), nn.Dropout(0.3)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(batch["x"].shape, generator=torch.Generator().manual_seed(seed))
        drawn = self.second(self.drop(torch.tanh(self.first(batch["x"] + 0.1 * noise))))
        loss = (drawn - batch["x"].sum(1, keepdim=True)).square().mean()
        return loss, {"seed": float(seed % 1000)}


def config(out: Path, **more: Any) -> TrainConfig:
    values = {"recipe": "noisy", "out": str(out), "steps": 6, "batch": 3, "lr": 0.05, "warmup": 2, "accumulate": 2}
    return TrainConfig.from_mapping(values | {"log_every": 1, "validate_every": 3, "checkpoint_every": 3} | more)


def weights(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "result" / "model.pt")


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight")
    train(Noisy(), config(out))
    return out


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, straight):
    with pytest.raises(Kill):
        train(Noisy(kill=9), config(tmp_path))  # batch 9 belongs to the fifth step
    assert [row[0] for row in curve(tmp_path)][-1] == "4"
    assert not (tmp_path / "checkpoints" / "0000006").exists()
    (tmp_path / "checkpoints" / "0000009.partial").mkdir()  # a kill while a checkpoint was written
    train(Noisy(), config(tmp_path))
    assert_same_run(tmp_path, straight)
    losses = [float(row[2]) for row in curve(straight) if row[1] == "loss"]
    assert len(losses) == 6 and len(set(losses)) == 6


def test_a_run_stopped_by_the_clock_leaves_a_checkpoint_and_goes_on(tmp_path, straight):
    train(Noisy(), config(tmp_path, minutes=0, checkpoint_every=100))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000001"]
    assert (tmp_path / "result" / "model.pt").exists()
    train(Noisy(), config(tmp_path))
    assert_same_run(tmp_path, straight)
    before = (tmp_path / "metrics.csv").read_text()
    train(Noisy(kill=0), config(tmp_path))  # finished: no batch is asked for
    assert (tmp_path / "metrics.csv").read_text() == before
    assert_same_run(tmp_path, straight)


def test_checkpoints_kept_and_config_recorded(straight, tmp_path):
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["0000003", "0000006"]
    train(Noisy(), config(tmp_path, checkpoint_every=1, keep_checkpoints=1))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000006"]
    assert json.loads((straight / "config.json").read_text())["lr"] == 0.05


def test_validation_sees_averaged_weights_in_eval_mode(straight, tmp_path):
    recipe = Noisy()
    train(recipe, config(tmp_path))
    assert recipe.validated == [(False, False)] * 2
    assert recipe.model.first.training and not recipe.model.frozen.training
    saved, trained = weights(tmp_path)["second.weight"], recipe.model.second.weight.detach()
    assert not torch.equal(saved, trained)
    logged = [float(row[2]) for row in curve(tmp_path) if row[:2] == ["6", "val_weight"]]
    assert logged[0] == pytest.approx(float(saved.sum()), rel=1e-4)
    still = Noisy()
    train(still, config(tmp_path / "no_average", ema=0.0))
    assert torch.equal(weights(tmp_path / "no_average")["second.weight"], still.model.second.weight)


def test_every_batch_is_read_once(tmp_path):
    for accumulate in (1, 2):
        out = tmp_path / str(accumulate)
        train(Noisy(), config(out, accumulate=accumulate))
        # the last of the batches of a step is logged
        assert [int(row[2]) + 1 for row in curve(out) if row[1] == "seed"] == [accumulate * (i + 1) for i in range(6)]


def test_learning_rate():
    values = {"recipe": "noisy", "out": "x", "steps": 100, "batch": 1, "lr": 1.0, "warmup": 10, "final_lr": 0.1}
    plan = TrainConfig.from_mapping(values)
    assert plan.lr_at(0) == pytest.approx(0.1) and plan.lr_at(9) == plan.lr_at(10) == pytest.approx(1.0)
    assert plan.lr_at(55) == pytest.approx(0.55) and plan.lr_at(100) == pytest.approx(0.1)
    constant = TrainConfig.from_mapping(values | {"lr_schedule": "constant"})
    assert constant.lr_at(99) == 1.0


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    recipe = Noisy()
    with torch.no_grad():
        recipe.model.second.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0; lower lr"):
        train(recipe, config(tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_config_errors(tmp_path):
    for values, message in (
        ({"recipe": "noisy"}, "lacks out, steps, batch, lr"),
        ({"lr_schedule": "linear"}, "expected one of cosine, constant"),
        ({"precision": "float16"}, "expected one of no, bf16, fp16"),
        ({"lr": "fast"}, "lr is 'fast'; expected a number"),
        ({"steps": 0}, "steps is 0; expected a whole number from 1 on"),
        ({"batch": 1.5}, "batch is 1.5; expected a whole number"),
        ({"log_every": 0}, "log_every is 0"),
        ({"clip": -1}, "clip is -1; expected a number from 0 on"),
    ):
        complete = {} if "recipe" in values else {"recipe": "noisy", "out": "x", "steps": 1, "batch": 1, "lr": 1}
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_mapping(complete | values)
    assert config(tmp_path, lr="1e-3").lr == 1e-3  # yaml reads this as text
    with pytest.raises(ValueError, match="no training config at"):
        run(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="holds list"):
        run(written(tmp_path, [1]))
    with pytest.raises(ValueError, match='recipe "cook" is unknown'):
        run(written(tmp_path, {**TINY, "recipe": "cook", "out": "x"}))
    with pytest.raises(ValueError, match="config lacks schedule; add it to the yaml file or pass --set schedule=value"):
        run(written(tmp_path, {**TINY, "recipe": "tokenizer", "out": "x"}))


def test_settings_that_nothing_reads_are_refused(tmp_path):
    values = TINY | {"recipe": "judge", "out": str(tmp_path / "run"), "data": "x", "val_data": "x"}
    recipes = {
        "tokenizer": TokenizerRecipe, "backbone": BackboneRecipe, "control": ControlRecipe, "judge": JudgeRecipe,
    }  # fmt: skip
    for name, recipe in recipes.items():
        with pytest.raises(ValueError, match=r"sets sofften, which nothing reads; this recipe knows .*data.* lr,"):
            recipe(TrainConfig.from_mapping(values | {"recipe": name, "sofften": 0.1}))
    # as from the command line, where the key may be a nested one
    with pytest.raises(ValueError, match="sets sofften"):
        run(written(tmp_path, values), {"sofften.share": 0.1})
    with pytest.raises(ValueError, match="do not take sise; a render store can be given path, split"):
        run(written(tmp_path, values), {"data": {"path": "x", "split": "val", "count": 1, "sise": 32}})
    with pytest.raises(ValueError, match="lack path, count; "):
        Renders({"split": "val"})


def test_nested_settings_are_changed_and_numbers_read(tmp_path):
    picture = {"online": True, "split": "val", "count": 2, "size": 32, "supersample": 1}
    values = TINY | {"recipe": "judge", "out": str(tmp_path / "run"), "data": picture, "val_data": picture}
    values |= {"judge": {"widths": [8, 8, 8, 8, 8]}, "soften": "1e-1", "validate_every": 9}
    path = written(tmp_path, values)
    changes = {"data.count": 3, "judge.widths": [8, 8, 8, 8, 16], "steps": 1}
    run(path, changes)
    used = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert used["data"] == picture | {"count": 3} and used["soften"] == 0.1
    assert AttributeJudge.from_pretrained(tmp_path / "run/result/judge").config["widths"] == [8, 8, 8, 8, 16]
    with pytest.raises(ValueError, match="soften is '1e-1', which has no settings of its own"):
        run(path, {"soften.share": 1})
    for text, read in (("1e-1", 0.1), ("-2.5E3", -2500.0), (".5e+2", 50.0), ("e5", "e5"), ("1e-1x", "1e-1x")):
        options = config(tmp_path, outer={"inner": [text]}).options
        assert options["outer"] == {"inner": [read]}
    assert config(tmp_path, minutes="5e-1", betas=["9e-1", 0.99]).minutes == 0.5
    assert config(tmp_path, minutes=None).minutes is None


def test_what_training_needs_is_checked_first(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="launched as 2 processes, but the recipe noisy runs in one"):
            train(Noisy(), config(tmp_path))
    for package in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"scaleweaver\[train\]"):
        train(Noisy(), config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_shuffled_epochs_and_pixels():
    rows = shuffled(5, 0, 0, 10)
    assert sorted(rows[:5]) == sorted(rows[5:]) == list(range(5)) and rows[:5] != rows[5:]
    assert shuffled(5, 0, 3, 4) == rows[3:7] and shuffled(5, 1, 0, 10) != rows
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert np.array_equal(as_pixels(to_images(pictures)), pictures)


def test_tokenizer_recipe(results):
    vae = BSQTokenizer.from_pretrained(results / "tokenizer/result/vae")
    assert vae.config["bits"] == 4
    names = {row[1] for row in curve(results / "tokenizer")}
    assert {"loss", "l1", "commitment", "entropy", "lr", "val_psnr", "val_f1_1px"} <= names
    assert (results / "tokenizer/samples/000002.png").is_file()


def test_backbone_recipe(results):
    pipe = VARControlPipeline.from_pretrained(results / "backbone/result")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cube", seed=0).images[0].size == (32, 32)
    names = {row[1] for row in curve(results / "backbone")}
    assert {"loss", "accuracy_0", "accuracy_1", "val_loss", "val_accuracy_1"} <= names
    saved = BSQTokenizer.from_pretrained(results / "tokenizer/result/vae").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in pipe.vae.state_dict().items())  # frozen


def test_judge_recipe(results):
    judge = AttributeJudge.from_pretrained(results / "judge/result/judge")
    assert judge.config["widths"] == [8, 8, 16, 16, 16]
    assert {"heat", "color", "val_kind", "val_soft_kind"} <= {row[1] for row in curve(results / "judge")}


def test_renders_name_their_scenes_and_missing_maps(results, tmp_path):
    both = Renders([str(results / "train"), str(results / "val")])
    assert len(both) == 7 and both.source(4) == ("train", 4) and both.source(6) == ("val", 1)
    bare = cache_renders(tmp_path, "train", start=3, count=1, size=32, supersample=1, captions=1, workers=0)
    renders = Renders(str(bare.path))
    assert renders.source(0) == ("train", 3)
    with pytest.raises(ValueError, match='rendered without "depth"'):
        renders.depth(0)
    with pytest.raises(ValueError, match='rendered without "keypoints"'):
        renders.skeleton(0)


def test_latents_are_computed_again_for_another_tokenizer(results, tmp_path):
    vae, renders = BSQTokenizer.from_pretrained(results / "tokenizer/result/vae"), Renders(str(results / "val"))
    first = np.array(cached_latents(tmp_path, vae, renders))
    assert first.shape == (2, 4, 4, 4)
    stamp = (tmp_path / "latents.npy").stat().st_mtime_ns
    cached_latents(tmp_path, vae, renders)
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == stamp
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(1.0)
    assert not np.array_equal(cached_latents(tmp_path, vae, renders), first)
