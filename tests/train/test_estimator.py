"""The recipe of the estimator: it learns, its labels are right, its scores are those of their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from scaleweaver.controls.estimator import JOINTS, ToyboxEstimator, locate_joints
from scaleweaver.evaluate.depth import depth_errors
from scaleweaver.toybox.drawing import COCO_18
from scaleweaver.toybox.store import RenderStore, cache_renders
from scaleweaver.train import run
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.estimator import (
    MIRRORED,
    EstimatorLoss,
    EstimatorRecipe,
    Example,
    collate,
    heat_maps,
    scores,
    slope,
)

WIDTHS = [8, 16, 16, 24, 24]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A few renders of 32 x 32, some of them with people."""
    path = tmp_path_factory.mktemp("renders") / "train"
    cache_renders(path, "train", count=8, size=32, supersample=1, captions=1, maps=("depth", "keypoints"), workers=0)
    return path


def config(store: Path, out: Path, **more: Any) -> dict[str, Any]:
    values = {"recipe": "estimator", "out": str(out), "data": str(store), "val_data": str(store), "soften": 0.5}
    values |= {"estimator": {"widths": WIDTHS, "size": 32}, "steps": 40, "batch": 8, "lr": 1e-2, "warmup": 5}
    return values | {"validate_every": 40, "checkpoint_every": 40, "log_every": 1, "ema": 0.9} | more


def person(height: int = 32, width: int = 32) -> Example:
    """A visible person with joints at random places, the left ankle hidden, the right ankle outside."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(4, 28, (JOINTS, 2)), np.full((JOINTS, 1), 2)], axis=1).astype(np.float32)
    points[COCO_18.index("left ankle"), 2] = 1
    points[COCO_18.index("right ankle")] = 0
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    depth = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    return Example(picture, depth, points)


def test_it_learns_a_few_renders_and_is_saved(store, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config(store, tmp_path / "run")))
    result = run(path) / "estimator"
    rows = [line.split(",") for line in (tmp_path / "run/metrics.csv").read_text().splitlines()]
    for name, share in (("loss", 0.6), ("depth", 0.5), ("sky", 0.6), ("joints", 0.95)):
        values = [float(row[2]) for row in rows if row[1] == name]
        assert len(values) == 40 and np.mean(values[-5:]) < share * np.mean(values[:3]), name
    names = {row[1] for row in rows}
    assert {f"val_{soft}{name}" for soft in ("", "soft_") for name in ("depth_rmse", "sky", "pck", "presence")} <= names
    assert (tmp_path / "run/samples/000040.png").is_file()
    kept = load_file(result / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    trained = ToyboxEstimator.from_pretrained(result)
    assert trained.config["size"] == 32 and trained.config["widths"] == WIDTHS
    renders = RenderStore(store)
    grey = [renders.map("depth", row) for row in range(8)]
    fresh = ToyboxEstimator(widths=WIDTHS, size=32)
    errors = [
        np.mean([depth_errors(*pair)["rmse_unit"] for pair in zip(e.depths(renders.images), grey, strict=True)])
        for e in (trained, fresh)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_batches_depend_on_their_number_and_show_people_twice(store, tmp_path):
    recipes = [EstimatorRecipe(TrainConfig.from_mapping(config(store, tmp_path))) for _ in range(2)]
    one, same, other = recipes[0].batch(3, 4), recipes[1].batch(3, 4), recipes[0].batch(4, 4)
    assert all(torch.equal(one[name], same[name]) for name in one) and not torch.equal(one["images"], other["images"])
    people = [row for row in range(8) if RenderStore(store).map("keypoints", row).any()]
    assert 0 < len(people) < 8 and recipes[0].order == [*range(8), *people]


def test_flipping_exchanges_left_and_right():
    before = person()
    after = before.flipped()
    assert [COCO_18[partner] for partner in MIRRORED[:4]] == ["nose", "neck", "left shoulder", "left elbow"]
    for name, partner in (("nose", "nose"), ("left wrist", "right wrist"), ("right eye", "left eye")):
        x, y, seen = before.points[COCO_18.index(name)]
        assert after.points[COCO_18.index(partner)] == pytest.approx([32 - x, y, seen])
    assert after.points[COCO_18.index("right ankle"), 2] == 1  # the hidden one is the right one now
    assert np.array_equal(after.points[COCO_18.index("left ankle")], [0, 0, 0])
    assert np.array_equal(after.picture[:, 0], before.picture[:, -1])
    assert np.array_equal(after.depth[:, 0], before.depth[:, -1])
    twice = after.flipped()
    assert np.array_equal(twice.picture, before.picture) and np.allclose(twice.points, before.points, atol=1e-5)
    nobody = Example(before.picture, before.depth, np.zeros((JOINTS, 3), np.float32))
    assert not nobody.flipped().points.any()


def test_labels_say_where_joints_are():
    example = person()
    heat = heat_maps(example.points[None], (8, 8))
    assert heat.shape == (1, JOINTS, 8, 8) and heat.sum((2, 3)) == pytest.approx(1.0)
    found = locate_joints(torch.from_numpy(heat).log())[0].numpy()
    there = example.points[:, 2] > 0
    assert np.abs(found[there, :2] - example.points[there, :2]).max() < 0.5 and found[:, 2].min() > 0.9
    batch = collate([example, Example(example.picture, example.depth, np.zeros((JOINTS, 3), np.float32))])
    assert batch["person"].tolist() == [1, 0] and not batch["weight"][1].any()
    weights = {name: float(batch["weight"][0, COCO_18.index(name)]) for name in ("nose", "left ankle", "right ankle")}
    assert weights == {"nose": 1.0, "left ankle": 0.5, "right ankle": 0.0}


def test_only_the_parts_that_are_known_are_in_the_loss():
    torch.manual_seed(0)
    loss = EstimatorLoss(ToyboxEstimator(widths=WIDTHS, size=32))
    example = person()
    nobody = Example(example.picture, example.depth, np.zeros((JOINTS, 3), np.float32))
    assert float(loss(collate([nobody]), 0)[1]["joints"]) == 0 and float(loss(collate([example]), 0)[1]["joints"]) > 0
    outside = example.points.copy()
    outside[COCO_18.index("right ankle"), :2] = 20
    other = Example(example.picture, example.depth, outside)
    assert torch.equal(loss(collate([example]), 0)[0], loss(collate([other]), 0)[0])
    error, solid = torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    error[0, :, 2:] = 3.0
    assert float(slope(error, solid)) == pytest.approx(1.0)  # a step of 3 at one of three places, none downwards
    solid[0, :, 2] = False
    assert float(slope(error, solid)) == 0


def test_scores():
    example = person()
    nobody = Example(example.picture, example.depth, np.zeros((JOINTS, 3), np.float32))
    truth, some = [example, nobody, nobody, nobody], np.stack([example.picture] * 4)
    estimator = ToyboxEstimator(widths=WIDTHS, size=32).eval()
    with torch.no_grad():
        estimator.person.weight.zero_()
        estimator.person.bias.fill_(-9.0)  # sees nobody anywhere
        for part in estimator.surface.parameters():
            part.zero_()  # sky starts at a logit of 0: all of it is sky, which is one depth
    values = scores(estimator, some, truth)
    assert values["pck"] == 0 and values["presence"] == 0.75
    assert values["depth_rmse"] == pytest.approx((example.depth / 255).std())
    assert values["sky"] == pytest.approx((example.depth == 0).mean())
    with torch.no_grad():
        estimator.person.bias.fill_(9.0)
    found = Example(example.picture, example.depth, estimator.keypoints(example.picture)[0])
    found.points[:, 2] = 2  # what it finds is the truth
    found.points[:9, 0] += np.ptp(found.points[:, 1])  # but half of the joints lie elsewhere
    values = scores(estimator, some, [found, nobody, nobody, nobody])
    assert values["pck"] == 0.5 and values["presence"] == 0.25
    assert np.isnan(scores(estimator, some[:1], [nobody])["pck"])


def test_data_that_will_not_do(store, tmp_path):
    online = {"online": True, "split": "val", "count": 2, "size": 32, "supersample": 1}
    for more, message in (
        ({"val_data": online}, "val_data is online"),
        ({"estimator": {"size": 64}}, r"data is 32 pixels wide; pass --set estimator\.size=32"),
        ({"sofften": 1}, "sets sofften"),
    ):
        with pytest.raises(ValueError, match=message):
            EstimatorRecipe(TrainConfig.from_mapping(config(store, tmp_path, **more)))
