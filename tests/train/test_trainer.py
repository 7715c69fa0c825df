"""The training loop: a killed run goes on bit by bit, and every recipe trains, saves and loads at a tiny size."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from noisy_run import Kill, Noisy, assert_same_run, config, weights
from tiny_runs import NEEDS_MUON, SCHEDULE, TINY, curve, written

from scaleweaver import VARControlPipeline
from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.toybox.scene import sample_scene
from scaleweaver.toybox.store import cache_renders
from scaleweaver.train import run
from scaleweaver.train.backbone import BackboneRecipe
from scaleweaver.train.batches import check_room
from scaleweaver.train.checkpoints import newest_checkpoint
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.data import Renders, as_pixels, cached_latents, shuffled, to_images
from scaleweaver.train.judge import JudgeRecipe
from scaleweaver.train.throughput import read_summary
from scaleweaver.train.tokenizer import TokenizerRecipe
from scaleweaver.train.trainer import train


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


def test_batches_made_ahead_are_the_same(tmp_path, straight):
    with pytest.raises(Kill):
        train(Noisy(kill=9), config(tmp_path, workers=1))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/0000003"
    train(Noisy(), config(tmp_path, workers=1))
    assert_same_run(tmp_path, straight)
    check_room({"x": torch.zeros(3)}, 1)
    with pytest.raises(ValueError, match=r"1000000000000 workers keep .* MB of batches in .*; set workers to \d+, or"):
        check_room({"x": torch.zeros(3)}, 10**12)


def test_a_compiled_network_keeps_its_names(tmp_path, straight):
    train(Noisy(), config(tmp_path, compile="eager", minutes=0))
    assert weights(tmp_path).keys() == weights(straight).keys()
    train(Noisy(), config(tmp_path))  # and goes on without
    assert_same_run(tmp_path, straight)
    with pytest.raises(ValueError, match=r"compile is 'inductr'; expected one of .*inductor"):
        train(Noisy(), config(tmp_path / "other", compile="inductr"))


def test_times_are_recorded(straight):
    with (straight / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    times = {name: [float(row[2]) for row in rows if row[1] == name] for name in ("seconds", "data_seconds")}
    assert len(times["seconds"]) == len(times["data_seconds"]) == 6
    assert all(0 <= part < whole for part, whole in zip(times["data_seconds"], times["seconds"], strict=True))
    assert re.fullmatch(r"[\d.]+ pictures/s, [\d.]+% of the time waiting for data", read_summary(straight))


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
    with pytest.raises(ValueError, match="cannot be parted; set path, and count"):
        Renders({"path": "x", "split": "val", "parts": 2})


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


def test_a_decoder_learns_alone(results, tmp_path):
    """The codes of a picture stay, so a transformer trained on them stays right."""
    start, data = results / "tokenizer/result/vae", str(results / "train")
    options = {"recipe": "tokenizer", "out": str(tmp_path / "run"), "data": data, "val_data": data}
    options |= {"schedule": SCHEDULE, "decoder_only": True, "lr": 1e-2}
    with pytest.raises(ValueError, match="decoder_only improves a trained tokenizer; name its folder as start_from"):
        run(written(tmp_path, TINY | options))
    run(written(tmp_path, TINY | options | {"start_from": str(start)}))
    before = BSQTokenizer.from_pretrained(start).state_dict()
    after = BSQTokenizer.from_pretrained(tmp_path / "run/result/vae").state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"decoder"}
    assert {"l1", "edges", "val_psnr"} <= {row[1] for row in curve(tmp_path / "run")}


@NEEDS_MUON
def test_a_backbone_goes_on_from_a_pipeline(results, tmp_path):
    pictures = {"data": str(results / "train"), "val_data": str(results / "val"), "schedule": SCHEDULE}
    options = TINY | pictures | {"recipe": "backbone", "out": str(tmp_path / "run"), "optimizer": "muon"}
    options |= {"vae": str(results / "tokenizer/result/vae"), "start_from": str(results / "backbone/result")}
    recipe = BackboneRecipe(TrainConfig.from_mapping(options))
    saved = VARControlPipeline.from_pretrained(results / "backbone/result")
    for one, other in ((recipe.transformer, saved.transformer), (recipe.text_encoder, saved.text_encoder)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
        assert all(p.requires_grad for p in one.parameters())
    assert recipe.tokenizer.get_vocab() == saved.tokenizer.get_vocab()
    run(written(tmp_path, options | {"by_magnitude": True}))
    gone_on = VARControlPipeline.from_pretrained(tmp_path / "run/result").transformer
    assert not torch.equal(gone_on.blocks[0].attn.qkv.weight, saved.transformer.blocks[0].attn.qkv.weight)
    other = BSQTokenizer(bits=8, stride=8, patch=2, fold=4, widths=[8, 16], norm_groups=4)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="train on the tokenizer it knows"):
        run(written(tmp_path, options | {"vae": str(tmp_path / "vae"), "out": str(tmp_path / "other")}))
    vae = BSQTokenizer.from_pretrained(options["vae"])
    options |= {"vae": str(tmp_path / "changed"), "out": str(tmp_path / "third")}
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1.0)
    vae.bfloat16().save_pretrained(tmp_path / "changed")  # the codes of both are the same
    assert BackboneRecipe(TrainConfig.from_mapping(options)).transformer.config == saved.transformer.config
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(1.0)
    vae.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="was trained on codes of another encoder"):
        BackboneRecipe(TrainConfig.from_mapping(options))


def test_captions_that_say_everything(results):
    renders = Renders(str(results / "train"))
    scenes = [sample_scene(*renders.source(row)) for row in range(5)]
    told = [explicit_caption(scene) for scene in scenes]
    assert renders.told_in_full(range(5), ["x"] * 5, [True] * 5) == told
    mixed = renders.told_in_full(range(5), ["x", "x", "", "", "x"], [True, False, True, False, False])
    assert mixed == [told[0], "x", "", "", "x"]


def test_a_share_of_captions_says_everything(results, tmp_path):
    """An empty prompt stays empty: it stands for the picture without its caption."""
    values = json.loads((results / "backbone/config.json").read_text())
    values |= values.pop("options") | {"out": str(tmp_path), "latents": str(results / "backbone/latents")}
    recipe = BackboneRecipe(TrainConfig.from_mapping(values | {"empty_prompts": 0.3, "explicit_captions": 0.5}))
    explicit = [recipe.renders.explicit_caption(row) for row in range(len(recipe.renders))]
    limit = recipe.transformer.config["text_length"]
    ids = recipe.tokenizer(["", *explicit], truncation=True, max_length=limit)["input_ids"]
    batch = recipe.batch(0, 200)
    found = [row[mask.bool()].tolist() for row, mask in zip(batch["ids"], batch["mask"], strict=True)]
    empty, full = (sum(row in some for row in found) for some in (ids[:1], ids[1:]))
    assert 35 < empty < 85 and 45 < full < 95


def test_pictures_rendered_when_read_are_encoded_with_the_step(results, tmp_path):
    values = json.loads((results / "backbone/config.json").read_text())
    options = values.pop("options") | {"data": {"online": True, "split": "train", "count": 4, "size": 32}}
    recipe = BackboneRecipe(TrainConfig.from_mapping(values | options | {"out": str(tmp_path)}))
    batch = recipe.batch(0, 2)
    assert batch["images"].shape == (2, 3, 32, 32) and "latent" not in batch
    ahead = {**batch, "latent": recipe.vae.encode(batch["images"])}
    with torch.no_grad():
        assert torch.equal(recipe.model(batch, 3)[0], recipe.model(ahead, 3)[0])


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


def test_latents_are_computed_again_for_another_tokenizer(results, tmp_path, monkeypatch):
    vae, renders = BSQTokenizer.from_pretrained(results / "tokenizer/result/vae"), Renders(str(results / "val"))
    first = np.array(cached_latents(tmp_path, vae, renders))
    assert first.shape == (2, 4, 4, 4)
    stamp = (tmp_path / "latents.npy").stat().st_mtime_ns
    cached_latents(tmp_path, vae, renders)
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == stamp
    # an interrupted call: the first row is noted as done, the second is not there yet
    mark = json.loads((tmp_path / "latents.json").read_text())
    (tmp_path / "latents.json").write_text(json.dumps(mark | {"rows": 1}))
    np.lib.format.open_memmap(tmp_path / "latents.npy", mode="r+")[:] = 7
    again = cached_latents(tmp_path, vae, renders)
    assert (again[0] == 7).all()
    np.testing.assert_allclose(again[1], first[1], atol=5e-3)  # alone in its batch, so summed in another order
    assert json.loads((tmp_path / "latents.json").read_text()) == mark
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(1.0)
    with monkeypatch.context() as patch, pytest.raises(AttributeError):  # killed before the first rows are there
        patch.delattr(BSQTokenizer, "encode")
        cached_latents(tmp_path, vae, renders)
    assert not (tmp_path / "latents.json").exists()  # nothing takes the empty file for latents
    other = cached_latents(tmp_path, vae, renders)
    assert not (other == 7).any() and not np.array_equal(other, first)
