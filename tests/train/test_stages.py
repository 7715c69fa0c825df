"""A recipe of several stages: killed and resumed, limited in time, moved to another folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import SCHEDULE, TINY, curve, written
from typer.testing import CliRunner

from scaleweaver import VARControlPipeline
from scaleweaver.cli import app
from scaleweaver.train.backbone import BackboneRecipe
from scaleweaver.train.checkpoints import newest_checkpoint
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Renders, stores_of
from scaleweaver.train.pieces import MANIFEST, pack, unpack
from scaleweaver.train.rendering import Renderers, rendered
from scaleweaver.train.stages import Clock, OutOfTime, Plan, read_plan, run_stages

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"count": 4, "size": 32, "supersample": 1, "captions": 2, "maps": ["depth", "keypoints"], "workers": 0}


class Kill(Exception):
    """Stands for what ends a run in between."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two stages, the second one in a file of its own, and their assembly."""
    folder = tmp_path_factory.mktemp("recipe")
    vae = {"bits": 4, "stride": 8, "patch": 2, "fold": 4, "widths": [8, 8], "norm_groups": 4}
    data = {"schedule": SCHEDULE, "data": {"path": "runs/tiny/renders/train", "split": "train", **PICTURES}}
    data |= {"val_data": {"path": "runs/tiny/renders/val", "split": "val", **PICTURES, "count": 1}}
    text = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    transformer = {"depth": 1, "width": 16, "heads": 2, "text_length": 64, "max_scales": 2}
    backbone = TINY | data | {"recipe": "backbone", "out": "elsewhere", "validate_every": 9, "lr": 1e-2}
    backbone |= {"vae": "runs/tiny/tokenizer/result/vae", "transformer": transformer, "text_encoder": text}
    (folder / "parts").mkdir()
    (folder / "parts" / "backbone.yaml").write_text(yaml.safe_dump(backbone | {"vocabulary": 300}))
    values = {
        "out": "runs/tiny",
        "stages": {
            "tokenizer": TINY | data | {"recipe": "tokenizer", "vae": vae, "steps": 1, "validate_every": 9},
            "backbone": {"file": "parts/backbone.yaml", "steps": 4, "transformer": {"depth": 2}},
        },
        "assembly": {
            "model": {"model": "runs/tiny/backbone/result", "temperature": 0.5},
            "vae": "runs/tiny/tokenizer/result/vae",
        },
        "presets": {
            "small": None,
            "large": {"every": {"batch": 4}, "stages": {"backbone": {"transformer": {"depth": 3}}}},
        },
    }  # fmt: skip
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))  # stages run in the order that they are in
    return file


def tiny(recipe: Path, out: Path, preset: str = "small", **overrides: Any) -> Plan:
    return read_plan(recipe, preset, out=out, overrides=overrides)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> Path:
    """All stages without interruption."""
    out = tmp_path_factory.mktemp("straight")
    said: list[str] = []
    assert run_stages(tiny(recipe, out), say=said.append)
    assert [line.partition(":")[0] for line in said] == ["tokenizer", "backbone", "assembly"]
    assert "pictures/s" in said[1] and "waiting for data" in said[1]
    return out


def killed(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends with the third batch of the backbone."""
    with monkeypatch.context() as patch:
        whole = BackboneRecipe.batch

        def batch(self: BackboneRecipe, index: int, size: int) -> Any:
            if index == 2:
                raise Kill
            return whole(self, index, size)

        patch.setattr(BackboneRecipe, "batch", batch)
        with pytest.raises(Kill):
            run_stages(tiny(recipe, out), say=lambda text: None)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "backbone/result/transformer/diffusion_pytorch_model.safetensors")


def same_run(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return curve(one / "backbone") == curve(other / "backbone") and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_stages_take_what_earlier_ones_gave(straight):
    pipe = VARControlPipeline.from_pretrained(straight / "assembly/result/model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cube", seed=0).images[0].size == (32, 32) and pipe.config["temperature"] == 0.5
    folder, file = straight / "assembly/result", "diffusion_pytorch_model.safetensors"
    parts = {part: load_file(folder / part / file) for part in ("vae", "model/vae", "model/transformer")}
    assert {x.dtype for x in parts["vae"].values()} == {torch.bfloat16}
    assert all(torch.equal(x, parts["model/vae"][name]) for name, x in parts["vae"].items())
    assert parts["model/transformer"].keys() == weights(straight).keys()


def test_a_killed_run_goes_on_in_its_stage(recipe, straight, tmp_path, monkeypatch):
    killed(recipe, tmp_path, monkeypatch)
    plan = tiny(recipe, tmp_path)
    assert [(s.finished, s.steps_done) for s in plan.stages] == [(True, 1), (False, 2), (False, 0)]
    before = (tmp_path / "tokenizer/metrics.csv").stat().st_mtime_ns
    said: list[str] = []
    assert run_stages(plan, say=said.append)
    assert said[0] == "tokenizer: finished before" and same_run(tmp_path, straight)
    assert (tmp_path / "tokenizer/metrics.csv").stat().st_mtime_ns == before
    assert run_stages(plan, say=said.append)
    assert said[-3:] == [f"{name}: finished before" for name in ("tokenizer", "backbone", "assembly")]


def test_minutes_span_all_stages(recipe, straight, tmp_path, monkeypatch):
    assert not run_stages(tiny(recipe, tmp_path), minutes=0, say=lambda text: None)
    assert not (tmp_path / "tokenizer").exists()  # no time even to prepare
    killed(recipe, tmp_path, monkeypatch)
    said: list[str] = []
    with monkeypatch.context() as patch:  # a preparation that does not end
        patch.setattr(BackboneRecipe, "_begin", lambda *_: time.sleep(600))
        assert not run_stages(tiny(recipe, tmp_path), minutes=0.001, say=said.append)
    assert said[-1] == "the time is over; the same command goes on"
    assert tiny(recipe, tmp_path).find("backbone").steps_done == 2
    with monkeypatch.context() as patch:  # a batch that takes all the time there is
        whole, minutes = BackboneRecipe.batch, 0.02

        def batch(self: BackboneRecipe, index: int, size: int) -> Any:
            time.sleep(60 * minutes)
            return whole(self, index, size)

        patch.setattr(BackboneRecipe, "batch", batch)
        assert not run_stages(tiny(recipe, tmp_path), minutes=minutes, say=said.append)
    assert tiny(recipe, tmp_path).find("backbone").steps_done in (2, 3)  # 2 where preparing alone takes that long
    assert run_stages(tiny(recipe, tmp_path), minutes=10, say=said.append) and same_run(tmp_path, straight)


def test_fewer_steps_than_are_done(recipe, tmp_path, monkeypatch):
    killed(recipe, tmp_path, monkeypatch)
    plan = tiny(recipe, tmp_path, **{"backbone.steps": 1})
    assert run_stages(plan, only="backbone", say=lambda text: None)
    assert plan.find("backbone").finished and plan.find("backbone").steps_done == 2


def test_the_end_interrupts_what_prepares():
    clock = Clock(0.05 / 60)
    with pytest.raises(OutOfTime), clock.interrupts():
        torch.set_grad_enabled(False)  # as where the end comes before a context has put it back
        torch.set_default_dtype(torch.float64)
        try:
            time.sleep(600)
        except Exception:  # as code that is interrupted may have it
            pytest.fail("the end was taken for an error")
    assert clock.left == 0 and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    with pytest.raises(OutOfTime) as caught, Clock(0.05 / 60).interrupts():
        try:
            time.sleep(600)
        except BaseException:
            raise OSError("a file that cannot be read") from None
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(OutOfTime), Clock(0.05 / 60).interrupts(), contextlib.suppress(BaseException):
        time.sleep(600)
    with pytest.raises(OSError, match="in time"), Clock(1).interrupts():
        raise OSError("in time")
    with Clock(None).interrupts():
        pass
    with Clock(1).interrupts():
        time.sleep(0.01)
    time.sleep(0.05)  # the alarm of a block that ended does not ring


def test_presets_and_changes(recipe, tmp_path):
    (tmp_path / "parts").mkdir()
    plan = tiny(recipe, tmp_path, "large", **{"backbone.transformer.width": 32})
    tokenizer, backbone = (plan.find(name).config for name in ("tokenizer", "backbone"))
    assert tokenizer is not None and backbone is not None
    assert tokenizer.batch == backbone.batch == 4 and backbone.steps == 4 and tokenizer.steps == 1
    assert backbone.options["transformer"] == {"depth": 3, "width": 32, "heads": 2, "text_length": 64, "max_scales": 2}
    assert backbone.out == str(tmp_path / "backbone") and backbone.options["vae"].startswith(str(tmp_path))
    assert [stage.needs for stage in plan.stages] == [(), ("tokenizer",), ("backbone", "tokenizer")]
    apart = tiny(recipe, tmp_path, **{"backbone.vae": "runs/tiny/tokenizer/result/vae"}).find("backbone")
    assert apart.needs == () and apart.config is not None
    assert apart.config.options["vae"] == "runs/tiny/tokenizer/result/vae"  # of another run: it stays
    for arguments, message in (
        ((recipe, "huge"), "preset is 'huge'.* has small, large"),
        ((recipe,), "preset is None"),
        ((written(tmp_path, {"stages": {}, "out": "x", "stage": 1}),), "sets stage, which nothing reads"),
        ((written(tmp_path / "parts", {"stages": {}}),), "lacks out or stages"),
    ):
        with pytest.raises(ValueError, match=message):
            read_plan(*arguments)
    values = yaml.safe_load(recipe.read_text())
    values["presets"]["large"]["evry"] = {"batch": 8}
    file = recipe.with_name("misspelt.yaml")
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ValueError, match=r"preset large of .* sets evry, which nothing reads"):
        read_plan(file, "large")
    assert read_plan(file, "small").preset == "small"
    store = {"path": "x", "split": "train"}
    for changes, message in (
        ({"backbone.sofften": 1}, "stage backbone: the training config sets sofften, which nothing reads"),
        ({"tokenizer.recipe": "cook"}, 'stage tokenizer: recipe "cook" is unknown; expected tokenizer, backbone'),
        ({"tokenizer.lr": "fast"}, "stage tokenizer: lr is 'fast'"),
        ({"backbone.data": store}, "lack count; a render store can be given path, split, start, count"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(recipe, tmp_path, **changes)
    with pytest.raises(ValueError, match=r"decoder is no stage of .*; it has tokenizer, backbone"):
        tiny(recipe, tmp_path, **{"decoder.steps": 1})
    with pytest.raises(ValueError, match="backbone takes the result of tokenizer, which is not finished"):
        run_stages(tiny(recipe, tmp_path), only="backbone")
    with pytest.raises(ValueError, match="was begun with preset 'small'"):
        run_stages(plan)


def test_the_recipe_of_the_repository(tmp_path):
    """Both presets can be read, train networks of the same form, and know each stage's settings."""
    plans = [read_plan(ROOT / "recipes" / "toybox.yaml", preset, out=tmp_path) for preset in ("cpu", "gpu")]
    names = [stage.name for stage in plans[0].stages]
    trained = ["tokenizer", "decoder", "backbone", "canny", "controls", "further", "estimator", "judge"]
    assert names == [*trained, "assembly"]
    for name in names[:-1]:
        cpu, gpu = (plan.find(name).config for plan in plans)
        assert cpu is not None and gpu is not None and gpu.compile and gpu.workers and not cpu.compile
        for option in ("vae", "transformer", "text_encoder", "adapter", "controls", "schedule", "estimator", "judge"):
            assert cpu.options.get(option) == gpu.options.get(option)
        assert all(str(tmp_path) in store["path"] for plan in plans for store in plan.find(name).stores())
    assert plans[1].find("controls").needs == ("canny",)


def test_an_assembly_that_weighs_too_much(recipe, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/assembly/finished.json").unlink()
    values = yaml.safe_load(recipe.read_text()) | {"weights_mb": 0.01}
    file = recipe.with_name("heavy.yaml")
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ValueError, match=r"MB, more than the 0\.01 of the recipe"):
        run_stages(tiny(file, tmp_path / "run"), say=lambda text: None)


def test_a_run_moves_in_pieces(recipe, straight, tmp_path, monkeypatch):
    here, there, pieces = tmp_path / "here", tmp_path / "there", tmp_path / "pieces"
    killed(recipe, here, monkeypatch)
    said = pack(tiny(recipe, here), pieces, piece=50_000)
    assert len(said) == 1 and max(file.stat().st_size for file in pieces.glob("piece-*")) == 50_000
    assert not list(pieces.glob("*/"))
    assert unpack(tiny(recipe, there), pieces)[0].endswith(f"files in {there}")
    assert [s.steps_done for s in tiny(recipe, there).stages] == [1, 2, 0]
    assert run_stages(tiny(recipe, there), say=lambda text: None) and same_run(there, straight)
    with pytest.raises(ValueError, match="has 4 steps, the pieces 2"):
        unpack(tiny(recipe, there), pieces)
    with pytest.raises(ValueError, match="is not empty"):
        pack(tiny(recipe, there), pieces)
    with pytest.raises(ValueError, match="holds a run of preset 'small', not 'large'"):
        unpack(tiny(recipe, tmp_path / "other", "large"), pieces)
    said = pack(tiny(recipe, there), tmp_path / "finished")
    assert len(said) == 1 and unpack(tiny(recipe, tmp_path / "third"), tmp_path / "finished")
    assert all(stage.finished for stage in tiny(recipe, tmp_path / "third").stages)
    assert VARControlPipeline.from_pretrained(tmp_path / "third/assembly/result/model").transformer is not None
    assert not (tmp_path / "third/backbone/result").exists()  # nothing takes it any more


def test_every_stage_under_way_is_packed(recipe, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(ValueError, match="has not made a step, so there is nothing to pack"):
        pack(tiny(recipe, here), tmp_path / "none")
    killed(recipe, here, monkeypatch)
    (here / "tokenizer/finished.json").unlink()  # as after a stage that was run alone, or had its steps raised
    assert [s.steps_done for s in tiny(recipe, here).stages] == [1, 2, 0]
    pack(tiny(recipe, here), tmp_path / "pieces")
    unpack(tiny(recipe, there), tmp_path / "pieces")
    assert [s.steps_done for s in tiny(recipe, there).stages] == [1, 2, 0]
    for name in ("tokenizer", "backbone"):
        one, other = (newest_checkpoint(out / name) for out in (here, there))
        assert one is not None and other is not None
        assert (one / "state.pt").read_bytes() == (other / "state.pt").read_bytes()


def test_what_does_not_fit_is_left_out(recipe, tmp_path, monkeypatch):
    here = tmp_path / "here"
    killed(recipe, here, monkeypatch)
    whole = sum(file.stat().st_size for file in _packed(recipe, here, tmp_path / "whole", 10**9))
    for form, said, share in (("without optimizer", "will start afresh", 0.9), ("rounded", "rounded to bf16", 0.45)):
        state = newest_checkpoint(here / "backbone")
        assert state is not None
        room = int(whole - (1 - share) * (state / "state.pt").stat().st_size)
        lines = pack(tiny(recipe, here), tmp_path / form, limit=room)
        assert said in lines[1] and json.loads((tmp_path / form / MANIFEST).read_text())["form"] == form
        there = tmp_path / f"there, {form}"
        assert said in unpack(tiny(recipe, there), tmp_path / form)[1]
        before, after = (torch.load(newest_checkpoint(out / "backbone") / "state.pt") for out in (here, there))
        assert after["optimizer"] is None and before["model"].keys() == after["model"].keys()
        for name, value in before["model"].items():
            kept = value.bfloat16().float() if form == "rounded" and value.dtype == torch.float32 else value
            assert torch.equal(after["model"][name], kept), name
        with pytest.warns(UserWarning, match="packed without the optimizer's state, which starts afresh"):
            assert run_stages(tiny(recipe, there), only="backbone", say=lambda text: None)
    with pytest.raises(ValueError, match=r"more than the 0\.0 that pieces may have; pass a higher --mebibytes"):
        pack(tiny(recipe, here), tmp_path / "none", limit=1000)


def _packed(recipe: Path, out: Path, folder: Path, piece: int) -> list[Path]:
    pack(tiny(recipe, out), folder, piece=piece)
    return sorted(folder.glob("piece-*"))


def test_pieces_that_will_not_do(recipe, straight, tmp_path):
    pieces = tmp_path / "pieces"
    first, *_ = _packed(recipe, straight, pieces, 20_000)
    good, manifest = first.read_bytes(), json.loads((pieces / MANIFEST).read_text())
    plan = tiny(recipe, tmp_path / "there")

    def refused(message: str, **changes: Any) -> None:
        (pieces / MANIFEST).write_text(json.dumps(manifest | changes))
        with pytest.raises(ValueError, match=message):
            unpack(plan, pieces)
        assert not (tmp_path / "there").exists() or not list((tmp_path / "there").iterdir())
        assert not (tmp_path / "outside").exists()

    first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused("piece-000 is missing or damaged")
    first.unlink()
    refused("piece-000 is missing or damaged")
    first.write_bytes(good)
    (one, *others), listed = manifest["files"], manifest["pieces"]
    for path in ("../outside", "/tmp/outside", "a/../../outside", "", "C:\\outside"):
        refused("lists .*, which is not what --pack writes", files=[one | {"path": path}, *others])
    refused("which is not what --pack writes", pieces=[listed[0] | {"name": "../piece-000"}, *listed[1:]])
    refused("which is not what --pack writes", files=[one, one | {"bytes": 0}, *others])
    refused("do not make up its files", files=[one | {"bytes": one["bytes"] + 1}, *others])
    refused("does not come out of the pieces", files=[one | {"sha256": "0" * 64}, *others])
    refused("do not make up its files", files=[])
    refused("is no manifest of a packed run", files=3)
    refused("is no manifest of a packed run", format=2)
    (pieces / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "there").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there/assembly").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="would be written outside of"):
        unpack(plan, pieces)
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        unpack(plan, tmp_path)


def test_stores_in_parts_are_rendered_by_processes(tmp_path):
    source = {"path": str(tmp_path / "train"), "split": "train", "start": 7, **PICTURES, "parts": 2}
    stores = [store for store in stores_of(source) if not isinstance(store, str)]
    assert [(store["path"][-3:], store["start"], store["count"]) for store in stores] == [("-00", 7, 2), ("-01", 9, 2)]
    renderers = Renderers(stores, 1)
    try:
        renderers.wait(stores)
    finally:
        renderers.close()
    assert [rendered(store) for store in stores] == [2, 2] and not Renderers(stores, 1).processes
    assert len(Renders(source)) == 4 and Renders(source).source(3) == ("train", 10)
    with pytest.raises(ValueError, match="cannot be parted; set path, and count to a multiple of parts"):
        Renders({**source, "parts": 3})


def test_command(recipe, straight, tmp_path):
    def call(*arguments: Any) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
        return result.exit_code, result.stdout + result.stderr

    given = (recipe, "--preset", "small", "--out", straight)
    code, said = call(*given, "--plan")
    assert code == 0 and said.count("finished") == 3 and "backbone" in said and "tokenizer" in said, said
    code, said = call(*given)
    assert code == 0 and "backbone: finished before" in said and f"{straight}/assembly/result" in said.replace("\n", "")
    code, said = call(*given, "--pack", tmp_path / "pieces")
    assert code == 0 and "MiB in 1 pieces and manifest.json" in said
    code, said = call(recipe, "--preset", "small", "--out", tmp_path / "run", "--unpack", tmp_path / "pieces")
    assert code == 0 and "files in" in said
    for arguments, message in (
        ((*given, "--model", "x"), "has several stages, so there is no --model; leave it out"),
        ((recipe.parent / "parts/backbone.yaml", "--plan"), "has no stages, so there is no --plan; leave it out"),
        ((*given, "--stage", "decoder"), "'decoder' is no stage of this recipe; it has tokenizer, backbone, assembly"),
        ((*given, "--pack", "x", "--unpack", "y"), "pass one of them"),
    ):
        code, said = call(*arguments)
        assert code == 1 and message in " ".join(said.split()), said


def test_minutes_of_a_single_training(recipe, straight, tmp_path):
    values = yaml.safe_load((recipe.parent / "parts/backbone.yaml").read_text())
    values |= {"out": str(tmp_path / "run"), "steps": 3, "vae": str(straight / "tokenizer/result/vae")}
    values |= {"data": str(straight / "renders/train"), "val_data": str(straight / "renders/val")}
    result = CliRunner().invoke(app, ["train", str(written(tmp_path, values)), "--minutes", "0"])
    assert result.exit_code == 0, result.output
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None and int(found.name) == 1 and TrainConfig.from_mapping(values).minutes is None
