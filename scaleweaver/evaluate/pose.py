"""Pose fidelity: are the people of a picture where the skeletons asked for them?

PCK@0.1 (percentage of correct key points, arXiv 1406.2984 for the idea) and the object key-point similarity of COCO
with its average precision, as HumanSD (arXiv 2304.04269) reports them. Key points are (people, 18, 3) in COCO-18 order:
x and y in pixels, and a third number that is 0 where a joint is not there; of found people it is the confidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]

# COCO's standard deviations by joint; its k_i is twice that. COCO annotates no neck, so the neck is left out
SIGMAS = {
    "nose": 0.026, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062, "hip": 0.107, "knee": 0.087, "ankle": 0.089,
    "eye": 0.025, "ear": 0.035,
}  # fmt: skip
_SIDE = ("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")
_NAMES = ("nose", "neck", *_SIDE[0], *_SIDE[0], *_SIDE[1], *_SIDE[1], "eye", "eye", "ear", "ear")
K = np.array([2 * SIGMAS.get(name, np.nan) for name in _NAMES])  # (18,)
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # .50:.95
MOST_FOUND = 20  # detections that COCO counts per picture


def pose_scores(found: Points, wanted: Points, *, reach: float = 0.1, area_factor: float = 1.0) -> dict[str, Any]:
    """What one picture contributes: JSON-able, to be summed up by `pose_summary`.

    "pck": share of the wanted joints within `reach` times the height of that person's box of exact joints; those of
    a person whom nobody was matched with are wrong; None without people. "oks": similarity of every found (rows) to
    every wanted person. "count_error": |people found - people wanted|. Joints that are hidden but drawn in the
    skeleton count like the others.
    """
    found, wanted = _people(found, "found"), _people(wanted, "wanted")
    table = [[oks(one, other, area_factor=area_factor) for other in wanted] for one in found]
    pairs = dict(greedy_pairs(np.array(table).reshape(len(found), len(wanted))))
    right, asked = 0, 0
    for number, person in enumerate(wanted):
        asked += int((person[:, 2] > 0).sum())
        if number in pairs:
            right += int(joints_near(found[pairs[number]], person, reach).sum())
    return {
        "pck": right / asked if asked else None,
        "oks": table,
        "confidence": [float(person[:, 2].mean()) for person in found],
        "people": len(wanted),
        "count_error": abs(len(found) - len(wanted)),
    }


def pose_summary(images: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """AP .50:.95, .50 and .75 over the `pose_scores` of many pictures; nothing where nobody was asked for."""
    if not sum(image["people"] for image in images):
        return {}
    by_threshold = {threshold: average_precision(images, threshold) for threshold in THRESHOLDS}
    return {"ap": float(np.mean(list(by_threshold.values()))), "ap50": by_threshold[0.5], "ap75": by_threshold[0.75]}


def joints_near(found: Points, wanted: Points, reach: float) -> NDArray[np.bool_]:
    """(18,) which wanted joints were found within `reach` of the person's height, False where none was wanted."""
    there = (wanted[:, 2] > 0) & (found[:, 2] > 0)
    distance = np.linalg.norm(found[:, :2] - wanted[:, :2], axis=1)
    return there & (distance <= reach * _box(wanted)[1])


def oks(found: Points, wanted: Points, *, area_factor: float = 1.0) -> float:
    """Object key-point similarity: mean over wanted joints of exp(-d^2 / (2 s^2 k_i^2)), 0 for one that is missing.

    s^2 is the area of the box around the person's exact joints, times `area_factor`: 0.53 is COCO's rule for boxes
    without a mask.
    """
    asked = (wanted[:, 2] > 0) & np.isfinite(K)
    if not asked.any():
        return 0.0
    width, height = _box(wanted)
    area = max(width * height * area_factor, 1e-9)
    square = ((found[:, :2] - wanted[:, :2]) ** 2).sum(axis=1)[asked]
    likeness = np.exp(-square / (2 * area * K[asked] ** 2)) * (found[asked, 2] > 0)
    return float(likeness.mean())


def greedy_pairs(table: NDArray[np.floating]) -> list[tuple[int, int]]:
    """(wanted, found) pairs of a similarity table (found, wanted): best pair first, each person once."""
    order = np.dstack(np.unravel_index(np.argsort(-table, axis=None, kind="stable"), table.shape))[0]
    pairs: list[tuple[int, int]] = []
    for one, other in order.tolist():
        if all(other != wanted and one != found for wanted, found in pairs):
            pairs.append((other, one))
    return pairs


def average_precision(images: Sequence[Mapping[str, Any]], threshold: float) -> float:
    """COCO's AP at one OKS threshold: precision at 101 recalls, detections of all pictures by confidence."""
    marks: list[tuple[float, bool]] = []
    for image in images:
        free = set(range(image["people"]))
        for one in np.argsort(-np.array(image["confidence"]), kind="stable")[:MOST_FOUND].tolist():
            likeness = {other: image["oks"][one][other] for other in free}
            best = max(likeness, key=likeness.__getitem__, default=None)
            hit = best is not None and likeness[best] >= threshold
            free -= {best} if hit else set()
            marks.append((image["confidence"][one], hit))
    wanted = sum(image["people"] for image in images)
    if not marks or not wanted:
        return 0.0
    hits = np.cumsum([hit for _, hit in sorted(marks, key=lambda mark: -mark[0])])
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    at = np.searchsorted(hits / wanted, np.linspace(0, 1, 101))
    return float(np.append(precision, 0.0)[at].mean())


def _box(person: Points) -> tuple[float, float]:
    """Width and height of the box around the joints that are there."""
    there = person[person[:, 2] > 0, :2]
    width, height = there.max(axis=0) - there.min(axis=0) if len(there) else (0.0, 0.0)
    return float(width), float(height)


def _people(points: Points, name: str) -> Points:
    people = np.asarray(points, np.float64)
    if people.size and (people.ndim != 3 or people.shape[1:] != (18, 3)):
        raise ValueError(f"{name} key points have shape {people.shape}; expected (people, 18, 3) in COCO-18 order")
    people = people.reshape(-1, 18, 3)
    return people[(people[:, :, 2] > 0).any(axis=1)]
