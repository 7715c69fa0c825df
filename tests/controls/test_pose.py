from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_controls import save_detector, save_vitpose

from scaleweaver.controls.openpose import draw_skeleton, to_json
from scaleweaver.controls.pose import Pose, pose
from scaleweaver.controls.vitpose import VitPose, cut, frame, peaks

RNG = np.random.default_rng(0)


def record() -> dict[str, Any]:
    points = RNG.uniform(5, 40, (2, 18, 3))
    points[..., 2] = np.linspace(0.05, 1, 18)
    return to_json(points, (48, 64))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    return {
        "pose": save_vitpose(folder / "pose"),
        "experts": save_vitpose(folder / "experts", experts=2),
        "hands": save_vitpose(folder / "hands", points=21),
        "people": save_detector(folder / "people", {0: "person", 1: "car"}, 2.0),
        "empty": save_detector(folder / "empty", {0: "person", 1: "car"}, -9.0),
        "cars": save_detector(folder / "cars", {0: "car", 1: "dog"}, 2.0),
    }


def photo(width: int = 40, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_json_is_drawn_in_place_of_a_picture(tmp_path: Path) -> None:
    made = record()
    (tmp_path / "pose.json").write_text(json.dumps(made))
    points = np.array([person["pose_keypoints_2d"] for person in made["people"]]).reshape(2, 18, 3)
    expected = draw_skeleton(points, (48, 64), 0.3)
    for source in (made, json.dumps(made), tmp_path / "pose.json", str(tmp_path / "pose.json")):
        drawn = Pose()(source)
        assert drawn.mode == "RGB" and drawn.size == (64, 48)
        assert np.array_equal(np.asarray(drawn), expected)
        assert np.array_equal(np.asarray(pose(source)), expected)
    everything = np.asarray(Pose(threshold=0)(made))
    assert np.array_equal(everything, draw_skeleton(points, (48, 64))) and not np.array_equal(everything, expected)
    assert Pose().draw(made, (96, 128)).size == (128, 96)


def test_vitpose_from_folders(networks: dict[str, str]) -> None:
    estimator = Pose(networks["pose"], detector=networks["people"], threshold=0, device="cpu")
    points = estimator.keypoints(photo())
    assert points.shape == (5, 18, 3) and points.dtype == np.float32 and np.isfinite(points).all()
    # somebody is found everywhere: the joints lie in what was cut out around the boxes
    boxes = estimator.network.__self__.detect(np.asarray(photo()))
    for person, box in zip(points, boxes, strict=True):
        x, y, width, height = frame(box, 24 / 32)
        slack = 0.15 * height
        assert (person[:, 0] >= x - slack).all() and (person[:, 0] <= x + width + slack).all()
        assert (person[:, 1] >= y - slack).all() and (person[:, 1] <= y + height + slack).all()
    drawn = estimator(photo())
    assert drawn.size == (40, 48) and np.array_equal(np.asarray(drawn), draw_skeleton(points, (48, 40)))
    assert np.array_equal(estimator.detect(np.asarray(photo())), np.asarray(drawn))
    assert np.array_equal(np.asarray(estimator(estimator.to_json(photo()))), np.asarray(drawn))
    few = Pose(networks["pose"], detector=networks["people"], people=2, device="cpu").keypoints(photo())
    np.testing.assert_allclose(few, points[:2], atol=1e-4)  # the surest
    assert Pose(networks["pose"], detector=networks["empty"]).keypoints(photo()).shape == (0, 18, 3)
    assert Pose(networks["experts"], detector=networks["people"]).keypoints(photo()).shape == (5, 18, 3)


def test_networks_load_late_and_go(networks: dict[str, str]) -> None:
    estimator = Pose(networks["pose"], detector=networks["people"], device="cpu")
    assert "network" not in vars(estimator)
    first = estimator.keypoints(photo())
    kept = estimator.network
    assert np.array_equal(estimator.keypoints(photo()), first) and estimator.network is kept
    estimator.unload()
    assert "network" not in vars(estimator)
    assert np.array_equal(estimator.keypoints(photo()), first)


def test_detect_resolution_moves_the_joints_back(networks: dict[str, str]) -> None:
    settings = {"detector": networks["people"], "device": "cpu"}
    large = photo().resize((80, 96), Image.Resampling.LANCZOS)
    small = large.resize((40, 48), Image.Resampling.LANCZOS)
    found = Pose(networks["pose"], detect_resolution=40, **settings).keypoints(large)
    expected = Pose(networks["pose"], **settings).keypoints(small)
    np.testing.assert_allclose(found, expected * (2, 2, 1), rtol=1e-5)
    assert Pose(networks["pose"], detect_resolution=40, **settings)(large).size == (80, 96)


def test_networks_that_do_not_fit_are_named(networks: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is a rt_detr, expected a vitpose.*blazepose"):
        VitPose(networks["people"], networks["people"])
    with pytest.raises(ValueError, match="finds 21 points; expected the 17"):
        VitPose(networks["hands"], networks["people"])
    with pytest.raises(ValueError, match="knows no person"):
        VitPose(networks["pose"], networks["cars"])
    with pytest.raises(ValueError, match="cannot be loaded for ObjectDetection"):
        VitPose(networks["pose"], networks["pose"])


def test_without_the_hub(networks: dict[str, str]) -> None:
    with pytest.raises(OSError, match=r"usyd-community/vitpose-base-simple.*model=\"blazepose\".*model=\"toybox\""):
        Pose("vitpose").keypoints(photo())
    with pytest.raises(OSError, match=r"PekingU/rtdetr_r50vd_coco_o365.*blazepose"):
        Pose(networks["pose"]).keypoints(photo())


def test_without_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"BlazePose .*mediapipe-0\.10\.21-cp311.*put a copy of mediapipe"):
        pose(photo())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 1.5}, "pose threshold=1.5; pass a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"people": 0}, "pose people=0; pass a whole number from 1"),
        ({"people": 1.5}, "people=1.5"),
        ({"model": ""}, "pose model=''"),
        ({"detect_resolution": 0}, "detect_resolution=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pose(**settings)


def test_bad_pictures_and_records() -> None:
    with pytest.raises(ValueError, match="there is no file"):
        Pose()("nowhere.png")
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.json'"):
        Pose()("nowhere.json")
    with pytest.raises(ValueError, match='no list "people"'):
        Pose()({})


def test_frame_and_cut_out() -> None:
    assert frame(np.array([10, 10, 30, 50]), 0.75) == pytest.approx((20 - 18.75, 30 - 25, 37.5, 50))
    assert frame(np.array([0, 20, 60, 40]), 0.75) == pytest.approx((30 - 37.5, 30 - 50, 75, 100))
    picture = np.arange(50, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    # the first and the last pixel lie on the frame's edges
    row = cut(picture, (10.0, 5.0, 24.0, 20.0), 13, 11)[5, :, 0]
    assert row.tolist() == list(range(10, 35, 2))


def test_peaks_between_the_cells() -> None:
    places = RNG.uniform(4, 20, (2, 17, 2))
    rows, columns = np.mgrid[:32, :24]
    distance = (columns - places[..., 0, None, None]) ** 2 + (rows - places[..., 1, None, None]) ** 2
    found = peaks((0.8 * np.exp(-distance / (2 * 2.0**2))).astype(np.float32))
    np.testing.assert_allclose(found[..., :2], places, atol=1e-3)
    assert (found[..., 2] <= 0.8).all() and (found[..., 2] > 0.7).all()
    flat = peaks(np.zeros((1, 17, 32, 24), np.float32))
    assert np.isfinite(flat).all() and not flat[..., 2].any()
    corner = np.zeros((1, 1, 32, 24), np.float32)
    corner[0, 0, 31, 23] = 1.0
    assert np.abs(peaks(corner)[0, 0, :2] - (23, 31)).max() <= 1
