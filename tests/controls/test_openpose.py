from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scaleweaver.controls.openpose import COCO_18, HUES, LIMBS, draw_skeleton, from_coco_17, from_json, is_json, to_json
from scaleweaver.toybox import drawing

RNG = np.random.default_rng(0)


def people(count: int) -> np.ndarray:
    points = RNG.uniform(1, 60, (count, 18, 3)).astype(np.float32)
    points[..., 2] = RNG.uniform(0.1, 1, (count, 18))
    return points


def flat(points: np.ndarray) -> list[float]:
    return points.ravel().tolist()


def test_the_toy_world_draws_with_the_same_function() -> None:
    assert drawing.draw_skeleton is draw_skeleton and drawing.LIMBS is LIMBS
    assert drawing.HUES is HUES and drawing.COCO_18 is COCO_18


@pytest.mark.parametrize(("size", "thick"), [((96, 128), 2), ((20, 30), 1), ((512, 640), 12)])
def test_the_drawing_is_what_adapters_were_trained_with(size: tuple[int, int], thick: int) -> None:
    """Limbs in their joints' hues at six tenths, joints over them; people one over the other; all in order."""
    points = people(2)
    points[..., :2] *= size[0] / 60
    points[1, 3] = 0
    expected = np.zeros((*size, 3), np.uint8)
    for person in points.astype(np.float64):
        places = [(round(16 * x), round(16 * y)) for x, y, _ in person]
        for i, (start, end) in enumerate(LIMBS):
            if person[start, 2] and person[end, 2]:
                dim = [0.6 * c for c in HUES[i]]
                cv2.line(expected, places[start], places[end], dim, thick, cv2.LINE_AA, 4)
        for i in np.flatnonzero(person[:, 2]):
            cv2.circle(expected, places[i], round(9.6 * thick), HUES[i], -1, cv2.LINE_AA, 4)
    assert np.array_equal(draw_skeleton(points, size), expected)


def test_joints_below_the_threshold_are_left_out() -> None:
    points = np.zeros((2, 18, 3))
    points[0, :2] = (10, 20, 0.9), (30, 20, 0.4)
    points[1, 4] = (50, 50, 0.2)
    everything = draw_skeleton(points, 64)
    assert everything[20, 10].any() and everything[20, 30].any() and everything[20, 20].any()
    assert tuple(everything[50, 50]) == HUES[4]
    sure = draw_skeleton(points, 64, threshold=0.3)
    assert sure[20, 30].any() and not sure[50, 50].any()
    surer = draw_skeleton(points, 64, threshold=0.4)  # not above it
    assert surer[20, 10].any() and not surer[20, 30].any() and not surer[20, 20].any()  # without an end, no limb
    with pytest.raises(ValueError, match=r"\(1, 17, 3\)"):
        draw_skeleton(np.zeros((1, 17, 3)), 64)


def test_json_round_trip(tmp_path: Path) -> None:
    points = people(3)
    points[1, 7] = 0
    record = to_json(points, (64, 80))
    assert (record["canvas_height"], record["canvas_width"], len(record["people"])) == (64, 80, 3)
    assert len(record["people"][0]["pose_keypoints_2d"]) == 54
    text = json.dumps(record)
    (tmp_path / "pose.json").write_text(text)
    for source in (record, text, [record], json.dumps([record]), tmp_path / "pose.json", str(tmp_path / "pose.json")):
        found, size = from_json(source)
        assert size == (64, 80) and found.dtype == np.float32
        np.testing.assert_allclose(found, points, atol=1e-3)
    assert np.array_equal(draw_skeleton(found, size, 0.3), draw_skeleton(from_json(text)[0], (64, 80), 0.3))


def test_nobody_is_no_error() -> None:
    found, size = from_json(to_json(np.zeros((0, 18, 3)), (10, 20)))
    assert found.shape == (0, 18, 3) and size == (10, 20)
    # people whose body was not found, as editors write them
    empty = {"people": [{"pose_keypoints_2d": None}, {"face_keypoints_2d": [1, 2, 1]}, {"pose_keypoints_2d": []}]}
    assert from_json(empty, (5, 6))[0].shape == (0, 18, 3)


def test_shares_of_the_canvas() -> None:
    points = people(2)
    record = to_json(points, (64, 128))
    for person in record["people"]:
        person["pose_keypoints_2d"] = flat(np.reshape(person["pose_keypoints_2d"], (18, 3)) / (128, 64, 1))
    np.testing.assert_allclose(from_json(record)[0], points, atol=1e-2)


def test_another_size() -> None:
    points = people(1)
    found, size = from_json(to_json(points, (64, 64)), (128, 32))
    assert size == (128, 32)
    np.testing.assert_allclose(found, points * (0.5, 2, 1), atol=1e-2)
    record = {"people": to_json(points, (1, 1))["people"]}
    np.testing.assert_allclose(from_json(record, (64, 64))[0], points, atol=1e-3)
    with pytest.raises(ValueError, match=r"canvas_height and canvas_width; pass size="):
        from_json(record)


def test_twenty_five_points() -> None:
    body = RNG.uniform(1, 60, (25, 3))
    (found,), _ = from_json(
        {"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": flat(body)}]}, (64, 64)
    )
    # BODY_25 has the middle of the hips after the arms, and the feet at the end
    expected = body[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_joint_without_confidence_is_not_there() -> None:
    points = people(1)
    points[0, 3] = (17, 18, 0)
    (found,), _ = from_json({"people": [{"pose_keypoints_2d": flat(points)}]}, (64, 64))
    assert not found[3].any() and found[4].any()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"people": ' + "1" * 5000 + "}", "not JSON"),
        ({"people": [{"pose_keypoints_2d": [10**400] * 54}]}, "person 0 is not a list of numbers"),
        ("[1, 2]", "is a list of 2"),
        ("[3]", "is of type int"),
        ({"persons": []}, r'no list "people" of objects \(found: persons\)'),
        ({"people": 3}, 'no list "people"'),
        ({"people": [{"pose_keypoints_2d": [1.0] * 51}]}, "person 0 has 51 numbers; expected .* 18 points"),
        ({"people": [{"pose_keypoints_2d": ["a"] * 54}]}, "person 0 is not a list of numbers"),
        ({"people": [{"pose_keypoints_2d": [None] * 54}]}, "person 0 is not a list of numbers"),
        ({"people": [{"pose_keypoints_2d": [float("nan")] * 54}]}, "person 0 is not a list of numbers"),
        ({"people": [{"pose_keypoints_2d": [[1, 2], [3]]}]}, "person 0 is not a list of numbers"),
        ({"people": [{"pose_keypoints_2d": [1e9, 5, 1] * 18}]}, "far outside of its canvas of 64x64"),
        ({"people": [], "canvas_width": 0, "canvas_height": 4}, "a canvas of 0x4"),
        ({"people": [], "canvas_width": 7}, "a canvas of 7xNone"),
        ("nowhere.json", "there is no file 'nowhere.json'"),
        (None, "is of type NoneType"),
    ],
)
def test_bad_records(record: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_json(record, (64, 64))


def test_no_canvas_is_larger_than_any_picture() -> None:
    record = {"people": [], "canvas_height": 99_999, "canvas_width": 99_998}
    with pytest.raises(ValueError, match="meant for a picture of 99998x99999, more than 100 million pixels; pass a sm"):
        from_json(record)
    with pytest.raises(ValueError, match="meant for a picture of 99998x99999"):
        from_json({"people": []}, (99_999, 99_998))
    assert from_json(record, (8, 9))[1] == (8, 9)


def test_files_as_editors_name_and_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\ufeff" + json.dumps(to_json(people(1), (64, 64)))
    (tmp_path / "[1] pose.json").write_text(text, encoding="utf-8")
    (tmp_path / "[2] photo.png").write_bytes(b"")
    for source in ("[1] pose.json", Path("[1] pose.json"), text):
        assert is_json(source) and len(from_json(source)[0]) == 1
    assert not is_json("[2] photo.png") and not is_json(Path("[3] photo.png"))


def test_what_is_json_and_what_a_picture() -> None:
    assert is_json({}) and is_json("a/b.JSON") and is_json(Path("pose.json")) and is_json(' {"people": []}')
    assert not is_json("a/b.png") and not is_json(np.zeros((2, 2))) and not is_json(b"{}")


def test_coco_17_to_18() -> None:
    points = np.arange(17 * 3, dtype=np.float64).reshape(17, 3)
    points[6, 2] = 2.5
    joints = dict(zip(COCO_18, from_coco_17(points), strict=True))
    for name, i in {
        "nose": 0,
        "left eye": 1,
        "right ear": 4,
        "left wrist": 9,
        "right hip": 12,
        "left ankle": 15,
    }.items():
        assert np.array_equal(joints[name], points[i]), name
    np.testing.assert_allclose(joints["neck"], [*(points[5, :2] + points[6, :2]) / 2, 2.5])
