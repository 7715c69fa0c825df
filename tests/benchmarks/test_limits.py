"""The study of what limits quality: its statistics, its variants, and all its parts end to end on a few scenes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.toybox.store import cache_renders
from scaleweaver.train.tokenizer import reconstruct

ROOT = Path(__file__).parents[2]
TINY = ["steps=2", "batch=2", "warmup=1", "precision='no'"]  # accelerate keeps one number format for the whole process


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when it is run by name: it reads its neighbours
    try:
        names = ("limits", "limits_shipped", "limits_training", "limits_page")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Few scenes, pictures for the trainings, and where everything goes."""
    folder = tmp_path_factory.mktemp("limits")
    for split, count in (("train", 4), ("val", 3)):
        cache_renders(folder / split, split, count=count, captions=1, supersample=1, workers=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AttributeJudge(widths=(8, 8, 16, 16, 16)).save_pretrained(folder / "judge")
        ToyboxEstimator(widths=(8, 8, 8, 8, 8), size=32).save_pretrained(folder / "estimator")
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": str(folder / "train"), "val_data": str(folder / "val")}))
    fixed = ["--data", str(folder / "data.yaml"), "--runs", str(folder / "runs"), "--out", str(folder / "limits.json")]
    fixed += ["--judge", str(folder / "judge"), "--estimator", str(folder / "estimator")]
    return [*fixed, "--count", "4", "--sampled", "2", "--held-out", "3"]


def test_shares_are_over_facts_and_their_errors_over_pictures(scripts):
    shares = scripts["limits_shipped"].shares
    found = [{"kind": [True]}, {"kind": [False]}, {"kind": [True]}, {"kind": [True]}]
    assert shares(found)["kind"] == 0.75
    assert shares(found)["kind_error"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)  # one fact each: that of a proportion
    twice = [{name: facts * 2 for name, facts in one.items()} for one in found]
    assert shares(twice)["kind_error"] == pytest.approx(shares(found)["kind_error"])  # nothing new was seen
    same = shares(found, found)
    assert same["kind_change"] == same["kind_change_error"] == 0
    worse = shares([{"kind": [False]}, *found[1:]], found)
    assert worse["kind_change"] == -0.25 and worse["kind_change_error"] > 0
    assert "relation" not in shares(found)


def test_distance_of_joints_leaves_out_those_that_are_not_there(scripts):
    wanted = np.zeros((18, 3))
    wanted[:2] = [[10, 10, 1], [20, 20, 1]]
    found = np.full((18, 3), 50.0)
    found[:2, :2] = [[13, 14], [20, 20]]
    assert scripts["limits_shipped"].joint_distance(found, wanted) == pytest.approx(2.5)


@pytest.mark.parametrize(("kind", "variants"), [("backbone", "BACKBONES"), ("tokenizer", "TOKENIZERS")])
def test_every_variant_is_another_run_of_the_recipe(scripts, kind, variants):
    training = scripts["limits_training"]
    runs = [training.settings_of(kind, changes) for changes in getattr(training, variants).values()]
    assert len({json.dumps(run) for run in runs}) == len(runs)
    assert len({run["steps"] for run in runs}) == 1
    if kind == "backbone":  # the other shapes do the same amount of work
        shapes = [run["options"]["transformer"] for run in runs]
        work = [shape["depth"] * shape["width"] ** 2 for shape in shapes]
        assert max(work) / min(work) < 1.1 and len({shape["width"] for shape in shapes}) == 3


def test_with_all_scales_true_the_picture_is_the_reconstruction(scripts, arguments):
    study = scripts["limits_shipped"].Study(scripts["limits"].read_arguments(arguments))
    expected = reconstruct(study.pipe.vae, study.references, study.schedule)
    drawn = study.draw(range(4), 6)
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    free = study.draw([2, 0])
    assert not np.array_equal(free, drawn[[2, 0]])
    assert np.array_equal(free, study.draw(range(4))[[2, 0]])  # scene i has seed i


def test_the_model_is_measured_once_shown_and_not_mixed(scripts, arguments, tmp_path):
    main = scripts["limits"].main
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured -->\n<!-- /measured -->\nafter\n")
    rows = ["0 scales", "6 scales", "true pictures", "as shipped", "temperature 0.01", "training", "held out"]
    call = [*arguments, "--parts", "prefix,sampling,kept,fit", *(word for row in rows for word in ("--only", row))]
    main(call)
    out = Path(arguments[arguments.index("--out") + 1])
    before = json.loads(out.read_text())
    main([*call, "--into", str(page), "--sheets", str(tmp_path)])
    report = json.loads(out.read_text())
    assert report["parts"] == before["parts"]  # not measured again
    parts = report["parts"]
    assert {row: cells["all"]["pictures"] for row, cells in parts["prefix"].items()} == dict.fromkeys(rows[:3], 4)
    assert 0 <= parts["prefix"]["0 scales"]["all"]["kind"] <= 1
    assert parts["kept"]["true pictures"]["f1_1px"] == 1 and "psnr" not in parts["kept"]["true pictures"]
    assert 15 < parts["kept"]["6 scales"]["psnr"] < 60
    assert parts["sampling"]["temperature 0.01"].keys() > parts["sampling"]["as shipped"].keys()
    assert all(0 < cells["loss"] < 1 and len(cells["scales"]) == 6 for cells in parts["fit"].values())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert f"| held out | {parts['fit']['held out']['loss']:.4f} ±" in text
    assert Image.open(tmp_path / "limits-prefix.png").width == 8 * 128
    assert Image.open(tmp_path / "limits-scales.png").width > 500
    with pytest.raises(ValueError, match="numbers of prefix with other settings"):
        main([*arguments, "--count", "2", "--parts", "prefix"])


def test_short_trainings_are_compared_with_the_baseline(scripts, arguments, tmp_path):
    main, out = scripts["limits"].main, tmp_path / "trained.json"
    given = [*arguments, "--out", str(out), *(word for entry in TINY for word in ("--set", entry))]
    shape = [word for name in ("depth", "heads") for word in ("--set", f"transformer.{name}=1")]
    main([*given, "--parts", "backbones", *shape, "--set", "transformer.width=64", "--only", "baseline",
          "--only", "learning rate x 2"])  # fmt: skip
    narrow = ["--set", "vae.widths=[16, 16]", "--set", "vae.encoder_blocks=1", "--set", "vae.decoder_blocks=1"]
    main([*given, "--parts", "tokenizers", *narrow, "--only", "baseline", "--only", "16 bits"])
    parts = json.loads(out.read_text())["parts"]
    faster = parts["backbones"]["learning rate x 2"]
    assert faster["averaged"]["loss_change"] == pytest.approx(
        faster["averaged"]["loss"] - parts["backbones"]["baseline"]["averaged"]["loss"], abs=2e-5
    )
    assert faster["averaged"]["loss"] != faster["last"]["loss"] != faster["mistaken history"]["loss"]
    assert faster["images_per_second"] > 0 and faster["gflop"] > 0
    base, small = parts["tokenizers"]["baseline"], parts["tokenizers"]["16 bits"]
    assert small["bits_a_picture"] * 2 == base["bits_a_picture"]
    assert small["psnr_change"] < 0
