"""Key points of people in OpenPose's COCO-18 order: as JSON, and as the coloured skeletons that pose adapters read.

Everywhere else in `controls/` people are one array, (people, 18, 3): x and y in pixels, and a confidence of 0 to 1 that
is 0 where a joint was not found.
"""

from __future__ import annotations

import colorsys
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaleweaver.images import MAX_PIXELS

COCO_18 = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
# eighteen hues around the circle, red first; limb i and joint i share colour i
HUES = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 18, 1.0, 1.0)) for i in range(18))
# COCO's own seventeen points have no neck and begin with the head: where each of our eighteen is found in them
_COCO_17 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
# of the points of OpenPose's BODY_25, the feet and the middle of the hips are left out
_BODY_25 = (*range(8), *range(9, 19))
_SHIFT = 4  # cv2 takes positions in sixteenths of a pixel
_FRACTIONS = 2.0  # a file whose coordinates are all below this gives them as shares of its canvas


def draw_skeleton(keypoints: ArrayLike, size: int | tuple[int, int], threshold: float = 0.0) -> NDArray[np.uint8]:
    """Skeletons on black, (height, width, 3) uint8 RGB.

    `keypoints` is (people, 18, 3) or (18, 3): x and y in pixels, and a visibility or confidence; joints where that is
    not above `threshold` are left out, hidden ones are drawn as OpenPose does. `size` is the side of a square or
    (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    people = np.asarray(keypoints, np.float64)
    if people.shape[-2:] != (18, 3):
        raise ValueError(f"keypoints have shape {people.shape}, expected (people, 18, 3) in COCO-18 order")
    canvas = np.zeros((height, width, 3), np.uint8)
    thick = max(1, round(min(height, width) / 42))
    for person in people.reshape(-1, 18, 3):
        points = [(round(x * 2**_SHIFT), round(y * 2**_SHIFT)) for x, y in person[:, :2]]
        seen = person[:, 2] > threshold
        for color, (start, end) in zip(HUES, LIMBS, strict=False):
            if seen[start] and seen[end]:
                dim = tuple(0.6 * channel for channel in color)
                cv2.line(canvas, points[start], points[end], dim, thick, cv2.LINE_AA, _SHIFT)
        for color, point, here in zip(HUES, points, seen, strict=True):
            if here:
                cv2.circle(canvas, point, round(0.6 * thick * 2**_SHIFT), color, -1, cv2.LINE_AA, _SHIFT)
    return canvas


def from_coco_17(points: NDArray[Any]) -> NDArray[np.float32]:
    """(..., 17, 3) in COCO's order -> (..., 18, 3); the neck is the middle of the shoulders, as sure as the worse."""
    shoulders = points[..., 5:7, :]  # (..., 2, 3)
    neck = np.concatenate([shoulders[..., :2].mean(-2), shoulders[..., 2].min(-1, keepdims=True)], axis=-1)  # (..., 3)
    joints = [neck if i is None else points[..., i, :] for i in _COCO_17]
    return np.stack(joints, axis=-2).astype(np.float32)  # (..., 18, 3)


def to_json(keypoints: ArrayLike, size: tuple[int, int]) -> dict[str, Any]:
    """OpenPose's record of the people in a picture of (height, width): pixels, and zeros for joints not found."""
    people = np.asarray(keypoints, np.float64)
    if people.shape[-2:] != (18, 3):
        raise ValueError(f"keypoints have shape {people.shape}, expected (people, 18, 3) in COCO-18 order")
    people = np.where(people[..., 2:] > 0, people, 0.0).reshape(-1, 54).round(4)
    return {
        "people": [{"pose_keypoints_2d": person} for person in people.tolist()],
        "canvas_height": int(size[0]),
        "canvas_width": int(size[1]),
    }


def from_json(
    source: Mapping[str, Any] | list[Any] | str | os.PathLike[str], size: tuple[int, int] | None = None
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """OpenPose JSON -> key points (people, 18, 3) in pixels, and the (height, width) they are meant for.

    `source` is the record itself, its text, or a file; a list of one record counts as the record. Bodies of 18 points
    (COCO) and of 25 (BODY_25) are read, faces and hands are not, and neither is a person without a body. Coordinates
    may be pixels or shares of the canvas. The canvas is `canvas_height` and `canvas_width` of the record; with `size`
    all is scaled to a picture of that (height, width), and a record without a canvas is taken to be of that size.
    Nothing is read for a picture of more than `MAX_PIXELS`.
    """
    record, name = _record(source)
    people = record.get("people")
    if not isinstance(people, list) or not all(isinstance(person, Mapping) for person in people):
        found = ", ".join(map(str, list(record)[:6])) or "nothing"
        raise ValueError(f'{name} has no list "people" of objects (found: {found}); pass OpenPose JSON')
    canvas = _canvas(record, name) or size
    if canvas is None:
        raise ValueError(f"{name} does not say canvas_height and canvas_width; pass size=(height, width)")
    target = size or canvas
    if target[0] * target[1] > MAX_PIXELS:
        raise ValueError(
            f"{name} is meant for a picture of {target[1]}x{target[0]}, more than {MAX_PIXELS // 10**6} million pixels;"
            " pass a smaller size=(height, width)"
        )
    bodies = [_body(person, i, name) for i, person in enumerate(people) if person.get("pose_keypoints_2d")]
    points = np.stack(bodies) if bodies else np.zeros((0, 18, 3))  # (people, 18, 3)
    points[points[..., 2] <= 0] = 0
    if bodies and np.abs(points[..., :2]).max() <= _FRACTIONS:
        points[..., :2] *= canvas[::-1]
    if (np.abs(points[..., :2]) > 100 * max(canvas)).any():
        raise ValueError(f"{name} has joints far outside of its canvas of {canvas[1]}x{canvas[0]}; check the file")
    points[..., :2] *= np.array(target[::-1]) / np.array(canvas[::-1])
    return points.astype(np.float32), target


def is_json(source: Any) -> bool:
    """Whether `source` is meant as OpenPose JSON rather than as a picture: a mapping, a .json file or JSON text."""
    if isinstance(source, Mapping):
        return True
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return isinstance(text, str) and (text.lower().endswith(".json") or _is_text(source))
    return False


def _is_text(source: str | os.PathLike[str]) -> bool:
    """Whether a string is JSON itself and not the name of a file, which may begin with a bracket too."""
    return isinstance(source, str) and source.lstrip("\ufeff \t\r\n")[:1] in ("{", "[") and not os.path.isfile(source)


def _record(source: Any) -> tuple[Mapping[str, Any], str]:
    """The parsed record, and what errors call it."""
    value, name = source, "the pose record"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if not _is_text(source):
            name = repr(text)
            if not os.path.isfile(text):
                raise ValueError(f"there is no file {name}; pass OpenPose JSON as a file, as text or as a dict")
            text = Path(text).read_text(encoding="utf-8", errors="replace")
        try:
            value = json.loads(text.lstrip("\ufeff"))  # the mark that some editors put first
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON ({error}); export the key points again") from None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Mapping):
        kind = f"a list of {len(value)}" if isinstance(value, list) else f"of type {type(value).__name__}"
        raise ValueError(f'{name} is {kind}; pass one object with the list "people"')
    return value, name


def _canvas(record: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    height, width = record.get("canvas_height"), record.get("canvas_width")
    if height is None and width is None:
        return None
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int | float) or not 1 <= side <= 100_000:
            raise ValueError(f"{name} has a canvas of {width!r}x{height!r}; both sides must be numbers of at least 1")
    return int(height), int(width)  # type: ignore[arg-type]


def _body(person: Mapping[str, Any], index: int, name: str) -> NDArray[np.float64]:
    """One person's body as (18, 3)."""
    flat = person["pose_keypoints_2d"]
    try:
        numbers = np.array(flat, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array(np.nan)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: pose_keypoints_2d of person {index} is not a list of numbers")
    if numbers.ndim != 1 or numbers.size not in (54, 75):
        raise ValueError(
            f"{name}: pose_keypoints_2d of person {index} has {numbers.size} numbers; expected x, y and confidence of"
            " 18 points (COCO) or of 25 (BODY_25)"
        )
    points = numbers.reshape(-1, 3)  # (18 or 25, 3)
    return points[list(_BODY_25)] if len(points) == 25 else points
