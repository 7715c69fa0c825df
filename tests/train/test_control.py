"""Recipe "control": one control or several, frozen backbone or not, on renders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_photos import save_photo_model
from tiny_pipeline import tiny_pipeline
from tiny_runs import TINY, curve, written

from scaleweaver import VARControlPipeline
from scaleweaver.adapters import trainable_parameters
from scaleweaver.contracts import Control
from scaleweaver.controls.canny import canny
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.toybox.drawing import draw_skeleton
from scaleweaver.toybox.store import cache_renders
from scaleweaver.train import run
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.data import Renders
from scaleweaver.train.maps import exact_map, varied_depth, varied_map, varied_skeleton


def test_control_recipe(results):
    pipe = VARControlPipeline.from_pretrained(results / "backbone/result")
    pipe.set_progress_bar_config(disable=True)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    assert pipe.load_control(results / "control/result/canny") == "canny"
    after = pipe.transformer.state_dict()
    inner = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert inner.keys() == before.keys() and all(torch.equal(inner[name], before[name]) for name in before)
    assert any(layer.weight.abs().sum() > 0 for layer in pipe.controls["canny"].z.values())
    edges = np.zeros((32, 32, 3), np.uint8)
    edges[8:24, 8] = 255
    assert pipe("a red cube", control=Control("canny", edges), seed=0).images[0].size == (32, 32)
    names = {row[1] for row in curve(results / "control")}
    assert {"val_loss_canny", "val_gain_canny", "val_loss_without", "val_f1", "val_f1_2px"} <= names
    assert (results / "control/samples/000002-canny.png").is_file()
    card = (results / "control/result/canny/README.md").read_text()
    assert "those of `result`" in card and "base_model" not in card  # a folder, and no Hub id


def test_control_recipe_reads_cached_text(results, tmp_path):
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(results / "backbone/result")}
    values |= {"data": str(results / "train"), "val_data": str(results / "val"), "text_dropout": 0.5, "batch": 4}
    values |= {"latents": str(results / "backbone/latents"), "adapter": {"lora_rank": 2}}
    losses = []
    for cached in (True, False):
        recipe = ControlRecipe(TrainConfig.from_mapping(values | {"out": str(tmp_path), "text_cache": cached}))
        batches = [recipe.batch(i, 4) for i in range(3)]
        assert all(("features" in batch) == cached for batch in batches)
        assert any(batch["drop"].any() for batch in batches) and not all(batch["drop"].all() for batch in batches)
        with torch.no_grad():
            losses.append([float(recipe.model(batch, 0)[0]) for batch in batches])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_control_recipe_trains_the_backbone_along(results, tmp_path):
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(results / "backbone/result"), "lr": 1e-2}
    values |= {"data": str(results / "train"), "val_data": str(results / "val"), "control_dropout": 0.5}
    values |= {"out": str(tmp_path / "run"), "latents": str(results / "backbone/latents"), "backbone_lr_scale": 1.0}
    values |= {"adapter": {"lora_rank": 2}}
    shutil.copytree(results / "backbone/result", tmp_path / "start")
    (tmp_path / "start/README.md").write_text("numbers of other weights")
    run(written(tmp_path, values | {"model": str(tmp_path / "start")}))
    assert "numbers of other weights" not in (tmp_path / "run/result/README.md").read_text()
    start = VARControlPipeline.from_pretrained(results / "backbone/result")
    pipe = VARControlPipeline.from_pretrained(tmp_path / "run/result")
    assert pipe.available_controls == ("canny",)
    pipe.unload_control("canny")
    for name, learned in (("transformer", True), ("text_encoder", True), ("vae", False)):
        before, after = (getattr(each, name).state_dict() for each in (start, pipe))
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[key], after[key]) for key in before) == learned
    for wrong in ({"backbone_lr_scale": -1.0}, {"text_cache": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ControlRecipe(TrainConfig.from_mapping(values | wrong))


def test_rows_without_the_control_are_as_with_no_adapter(results, tmp_path):
    values = TINY | {"recipe": "control", "kind": "canny", "model": str(results / "backbone/result")}
    values |= {"data": str(results / "train"), "val_data": str(results / "val"), "control_dropout": 1.0, "batch": 4}
    values |= {"latents": str(results / "backbone/latents"), "out": str(tmp_path), "adapter": {"lora_rank": 2}}
    recipe = ControlRecipe(TrainConfig.from_mapping(values))
    batch = dict(recipe.batch(0, 4))
    seen = batch.pop("seen.canny")
    assert seen.tolist() == [True, False, False, False]  # one always looks, else nothing would learn
    assert batch.pop("maps.canny").shape == (1, 3, 32, 32)
    for z in recipe.pipe.controls["canny"].z.values():
        torch.nn.init.normal_(z.weight)
    pictures = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    nobody = {"seen.canny": torch.zeros(4, dtype=torch.bool)}
    cases = [nobody, nobody | {"maps.canny": pictures[:1]}]  # a map that no row looks at changes nothing
    for some in ([1, 3], [0, 1, 2, 3]):
        sees = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(some), True)
        cases += [{"seen.canny": sees, "maps.canny": maps[sees]} for maps in (pictures, pictures.flip(0))]
    with torch.no_grad():
        scores = [float(recipe.model(batch | case, 0)[0]) for case in cases]
    assert scores[0] == scores[1] and len(set(scores[1:])) == 5


def test_control_recipe_on_an_infinity_schedule_with_text_in_its_condition(tmp_path):
    save_photo_model(tmp_path / "model")
    pictures = {"online": True, "split": "val", "count": 2, "size": 256, "supersample": 1}
    values = TINY | {"recipe": "control", "kind": "canny", "out": str(tmp_path / "run"), "steps": 1}
    values |= {"model": str(tmp_path / "model"), "data": pictures, "val_data": pictures | {"start": 9}}
    adapter = {"lora_rank": 2, "condition_modulation": "text", "thresholds": [30, 60]}
    run(written(tmp_path, values | {"adapter": adapter}))
    names = {row[1] for row in curve(tmp_path / "run")}
    assert {"loss", "accuracy_6", "val_loss_canny", "val_f1"} <= names
    recipe = ControlRecipe(TrainConfig.from_mapping(values | {"adapter": adapter}))
    edges = np.asarray(canny(recipe.held_out.image(1), 30, 60))
    assert isinstance(recipe.held_out, Renders)
    made = exact_map(recipe.pipe.controls["canny"].config, recipe.held_out, 1)
    assert np.array_equal(made, edges) and edges.any()
    with pytest.raises(ValueError, match="pictures are 128x128, the model draws 256x256"):
        run(written(tmp_path, values), {"data.size": 128})


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> dict[str, Any]:
    """Settings of a run with four controls, one of which the model has."""
    folder = tmp_path_factory.mktemp("several")
    torch.manual_seed(0)
    tiny_pipeline("canny").save_pretrained(folder / "model")
    for split, count in (("train", 12), ("val", 4)):
        maps = ("depth", "keypoints")
        cache_renders(folder / split, split, count=count, size=32, supersample=1, captions=2, maps=maps, workers=0)
    values = TINY | {"recipe": "control", "model": str(folder / "model"), "control_dropout": 0.0, "batch": 6}
    values |= {"data": str(folder / "train"), "val_data": str(folder / "val"), "latents": str(folder / "latents")}
    controls = {name: {"start_from": "canny"} for name in ("depth", "pose", "palette")}
    return values | {"out": str(folder / "run"), "controls": {"canny": {"lora_rank": 3}} | controls}


def recipe_of(values: dict[str, Any], **more: Any) -> ControlRecipe:
    return ControlRecipe(TrainConfig.from_mapping(values | more))


def looks(batch: Any) -> np.ndarray:
    """(controls, B): who sees what; the maps are those of the rows that look."""
    names = [name.removeprefix("seen.") for name in batch if name.startswith("seen.")]
    for name in names:
        assert int(batch[f"seen.{name}"].sum()) == len(batch.get(f"maps.{name}", ()))
    return np.array([batch[f"seen.{name}"].tolist() for name in names])


def test_several_controls_learn_in_one_run(several):
    run(written(Path(several["out"]).parent, several), {"pairs": 0.3, "lr": 1e-2})
    out = Path(several["out"])
    assert sorted(path.name for path in (out / "result").iterdir()) == ["canny", "depth", "palette", "pose"]
    names = {row[1] for row in curve(out)}
    assert {f"val_{what}_{name}" for what in ("loss", "gain") for name in several["controls"]} <= names
    assert {f"000002-{name}.png" for name in several["controls"]} == {p.name for p in (out / "samples").iterdir()}
    pipe = VARControlPipeline.from_pretrained(several["model"])
    start = {k: v.clone() for k, v in trainable_parameters(pipe.transformer, pipe.controls["canny"], "canny").items()}
    for name in several["controls"]:
        pipe.load_control(out / "result" / name, f"my-{name}")
        learned = trainable_parameters(pipe.transformer, pipe.controls[f"my-{name}"], f"my-{name}")
        if name != "canny":  # begun with other weights and another rank
            assert learned.keys() == start.keys()
        assert any(v.shape != start[k].shape or not torch.equal(v, start[k]) for k, v in learned.items()), name


def test_a_control_starts_from_another(several):
    recipe = recipe_of(several)
    pipe = VARControlPipeline.from_pretrained(several["model"])
    start = trainable_parameters(pipe.transformer, pipe.controls["canny"], "canny")
    for name in ("depth", "pose", "palette"):
        copy = trainable_parameters(recipe.pipe.transformer, recipe.pipe.controls[name], name)
        assert all(torch.equal(copy[key], start[key]) for key in start) and copy.keys() == start.keys()
        assert recipe.pipe.controls[name].config.kind == name and recipe.pipe.controls[name].config.lora_rank == 2
    assert recipe.pipe.controls["canny"].config.lora_rank == 3  # a fresh one, as its settings say
    trained = {id(p) for group in recipe.parameter_groups() for p in group["params"]}
    learns = {id(p) for p in recipe.model.parameters() if p.requires_grad}
    assert trained == learns and len(trained) > 3 * len(start)


def test_every_row_sees_one_control_or_two(several):
    one, two = (recipe_of(several, pairs=share) for share in (0.0, 1.0))
    batches = [(looks(one.batch(i, 6)), looks(two.batch(i, 6))) for i in range(4)]
    assert all((single.sum(0) == 1).all() and (double.sum(0) == 2).all() for single, double in batches)
    assert (sum(single for single, _ in batches).sum(1) > 0).all()  # every control has its turn
    none = recipe_of(several, control_dropout=1.0)
    assert looks(none.batch(0, 6)).sum() == 1


def test_rows_without_a_person_get_no_pose(several):
    recipe = recipe_of(several, controls={"pose": {"start_from": "canny"}})
    people = [recipe.pictures.keypoints(row) is not None for row in range(len(recipe.pictures))]
    assert any(people) and not all(people)
    for index in range(2):
        rows = recipe.pictures.rows(0, index * 6, 6)
        assert looks(recipe.batch(index, 6))[0].tolist() == [people[row] for row in rows]


def test_wrong_settings_of_several_controls(several):
    with pytest.raises(ValueError, match="controls and kind were both set"):
        recipe_of(several, kind="canny")
    with pytest.raises(ValueError, match="start_from is 'sketch'; the model has the controls canny"):
        recipe_of(several, controls={"depth": {"start_from": "sketch"}})
    with pytest.raises(ValueError, match="expected a mapping from names to settings"):
        recipe_of(several, controls={})
    with pytest.raises(ValueError, match="unknown control settings"):
        recipe_of(several, controls={"depth": {"rank": 2}})
    with pytest.raises(ValueError, match="ratios is for photos"):
        recipe_of(several, ratios=["1.0"])
    for wrong in ({"text_cache": True}, {}, {"data": {"photos": "x"}, "text_cache": False}):
        with pytest.raises(ValueError, match="explicit_captions needs renders and text_cache=false"):
            recipe_of(several, explicit_captions=0.3, **wrong)
    assert recipe_of(several, explicit_captions=0.3, text_cache=False).text is None
    with pytest.raises(ValueError, match="backbone that learns needs float32"):
        recipe_of(several, backbone_lr_scale=1.0, dtype="bfloat16")


def test_maps_vary_as_detectors_do(several):
    renders = Renders(several["data"])
    rng = np.random.default_rng(0)
    person = next(row for row in range(len(renders)) if renders.keypoints(row) is not None)
    for kind in ("canny", "depth", "palette", "pose"):
        config = ScaleWeaverConfig(kind=kind)
        exact = exact_map(config, renders, person)
        assert exact is not None and exact.shape == (32, 32, 3) and exact.dtype == np.uint8
        found = [varied_map(config, renders, person, rng) for _ in range(6)]
        assert len({each.tobytes() for each in found if each is not None}) > 1, kind
        again = [varied_map(config, renders, person, np.random.default_rng(5)) for _ in range(2)]
        assert np.array_equal(again[0], again[1])
    fine, coarse = (
        np.asarray(exact_map(ScaleWeaverConfig(kind="palette", detector=detector), renders, person))
        for detector in ("palette-8", "palette-2")
    )
    colours = [len(np.unique(each.reshape(-1, 3), axis=0)) for each in (fine, coarse)]
    assert colours[1] <= 4 < colours[0]
    depth = renders.depth(person)
    assert np.abs(varied_depth(depth, rng).astype(float) - depth).mean() < 40  # still that scene
    points = renders.keypoints(person)
    assert points is not None and points[:, 2].any()
    drawn = varied_skeleton(points, 32, rng)
    assert drawn.any() and not np.array_equal(drawn, draw_skeleton(points[None], 32))
    with pytest.raises(ValueError, match='control kind "sketch" has no training maps'):
        exact_map(ScaleWeaverConfig(kind="sketch"), renders, 0)
