"""The estimator: any size in, the same size out, nobody is nobody; what ships reads pictures of its world."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaleweaver.controls import estimator as module
from scaleweaver.controls.estimator import FARTHEST, JOINTS, ToyboxEstimator, locate_joints
from scaleweaver.evaluate.depth import depth_errors
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.store import stored_arrays
from scaleweaver.train.estimator import MIRRORED


@pytest.fixture
def tiny() -> ToyboxEstimator:
    """Random weights; somebody everywhere."""
    torch.manual_seed(0)
    network = ToyboxEstimator(widths=(8, 8, 16, 16, 16), size=32).eval()
    with torch.no_grad():
        network.person.weight.zero_()
        network.person.bias.fill_(4.0)
    return network


@pytest.fixture(scope="module")
def world() -> dict[str, np.ndarray]:
    """A few scenes that the built-in network was not trained on, with their exact maps."""
    return stored_arrays(draw_batch("test", range(12), size=128))


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_saved_and_loaded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = ToyboxEstimator.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny.state_dict().items())
    some = pictures(3, 32, 32)
    assert again.depths(some) == pytest.approx(tiny.depths(some), abs=1e-5)
    assert np.stack(again.poses(some)) == pytest.approx(np.stack(tiny.poses(some)), abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (128, 128), (1, 1), (37, 201), (300, 20)])
def test_any_size(tiny, height, width):
    picture = pictures(height, width)
    depth, points = tiny.depth(picture), tiny.keypoints(picture)
    assert depth.shape == (height, width) and depth.dtype == np.float32
    assert (((depth >= FARTHEST) | (depth == 0)) & (depth <= 1)).all()
    assert points.shape == (1, JOINTS, 3) and points.dtype == np.float32
    assert ((points[..., 0] > 0) & (points[..., 0] < width) & (points[..., 1] > 0) & (points[..., 1] < height)).all()
    assert ((points[..., 2] > 0) & (points[..., 2] <= 1)).all()


def test_answers_are_in_the_pixels_of_the_picture(tiny):
    picture = pictures(32, 32)
    wide = picture.repeat(2, axis=0).repeat(3, axis=1)  # averages back to the same
    points, wider = tiny.keypoints(picture), tiny.keypoints(wide)
    assert wider == pytest.approx(points * [3, 2, 1], rel=1e-5)
    depth, wider_depth = tiny.depth(picture), tiny.depth(wide)
    assert wider_depth.shape == (64, 96) and abs(float(wider_depth.mean() - depth.mean())) < 0.05
    # a view of another order of memory is read as what it shows
    turned = np.ascontiguousarray(picture[:, ::-1])
    assert np.array_equal(tiny.depth(picture[:, ::-1]), tiny.depth(turned))


def test_a_picture_does_not_depend_on_its_batch(tiny):
    some = pictures(5, 40, 24)
    depths, poses = tiny.depths(some, batch=2), tiny.poses(some, batch=2)
    assert len(poses) == 5
    for picture, depth, points in zip(some, depths, poses, strict=True):
        assert tiny.depth(picture) == pytest.approx(depth, abs=1e-5)
        assert tiny.keypoints(picture) == pytest.approx(points, abs=1e-4)
    assert tiny.depths(some[:0]).shape == (0, 40, 24) and tiny.poses(some[:0]) == []


def test_nobody(tiny):
    some = pictures(2, 32, 32)
    surest = tiny.poses(some)[0][..., 2].max()
    with torch.no_grad():
        tiny.person.bias.fill_(-0.1)
    assert [people.shape for people in tiny.poses(some)] == [(0, JOINTS, 3)] * 2
    tiny.register_to_config(threshold=0.4)
    there = tiny.keypoints(some[0])
    assert there.shape == (1, JOINTS, 3) and there[..., 2].max() < surest  # less sure that somebody is there


def test_joints_between_cells():
    logits = torch.full((1, JOINTS, 8, 8), -30.0)
    logits[0, :, 3, 4] = logits[0, :, 3, 5] = 5.0  # twice the same: half-way
    logits[0, 0, 0, 0] = 5.0  # a rival far away takes a third of the confidence, the first of the best wins
    found = locate_joints(logits)[0]
    assert found[1].tolist() == pytest.approx([20, 14, 1])
    assert found[0].tolist() == pytest.approx([2, 2, 1 / 3], abs=1e-5)


def test_pictures_that_will_not_do(tiny):
    for call, wrong, message in (
        (tiny.depth, pictures(2, 32, 32), r"\(2, 32, 32, 3\); expected an array \(H, W, 3\)"),
        (tiny.keypoints, "photo.png", "picture is str; expected an array"),
        (tiny.depths, pictures(32, 32), r"pictures of shape \(32, 32, 3\); expected \(B, H, W, 3\)"),
        (tiny.poses, pictures(1, 32, 32)[..., :1], r"expected \(B, H, W, 3\)"),
        (tiny.depth, pictures(0, 32), r"expected \(B, H, W, 3\)"),
        (tiny.depth, pictures(32, 32) / 255, "are float64; expected uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            call(wrong)
    with pytest.raises(ValueError, match="size is 100; expected a multiple of 32"):
        ToyboxEstimator(size=100)


def test_a_package_without_the_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"not part of this installation \(.* lacks config\.json\); run"):
        ToyboxEstimator.built_in()


def test_the_built_in_one_reads_its_world(world):
    network = ToyboxEstimator.built_in()
    assert network.dtype == torch.float32 and not network.training
    grey = world["depth"]
    depths, poses = network.depths(world["images"]), network.poses(world["images"])
    assert ((depths == 0) == (grey == 0)).mean() > 0.98
    errors = [depth_errors(*pair)["rmse_unit"] for pair in zip(depths, grey, strict=True)]
    assert np.mean(errors) < 0.07  # two scenes that have nothing in common differ by about 0.18
    truth = world["keypoints"]
    somebody = truth.any((1, 2))
    assert 0 < somebody.sum() < len(truth) and [len(people) for people in poses] == somebody.astype(int).tolist()
    away = [np.linalg.norm(poses[i][0, :, :2] - truth[i, :, :2], axis=1) for i in np.flatnonzero(somebody)]
    assert np.median(away) < 3  # pixels of 128

    # mirrored, the person's right is where the left was
    flipped = network.poses(np.ascontiguousarray(world["images"][:, :, ::-1]))
    moved = []
    for one, other in zip(poses, flipped, strict=True):
        if len(one) and len(other):
            mirrored = other[0, MIRRORED, :2] * [-1, 1] + [128, 0]
            moved.append(np.median(np.linalg.norm(one[0, :, :2] - mirrored, axis=1)))
    assert moved and max(moved) < 4
