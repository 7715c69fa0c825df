from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaleweaver.controls.blazepose import (
    CACHED,
    LANDMARK_SIZE,
    BlazePose,
    Region,
    anchors,
    cut,
    decode,
    merge,
    refine,
    region,
)
from scaleweaver.controls.wheels import cache_folder

LEFT_WRIST = 15  # among the thirty-three points


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def dot(picture: np.ndarray, x: float, y: float, radius: float) -> None:
    """A red dot; places in sixteenths of a pixel."""
    place = round(16 * x), round(16 * y)
    cv2.circle(picture, place, round(16 * radius), (255, 0, 0), -1, cv2.LINE_AA, 4)


class Finder(nn.Module):
    """A detector that finds given people: x, y of the hips and radius in shares of the square, and a probability."""

    def __init__(self, *people: tuple[float, float, float, float]) -> None:
        super().__init__()
        self.people = people
        self.seen = torch.zeros(0)

    def forward(self, square: Tensor) -> list[Tensor]:
        self.seen = square
        raw, scores = torch.zeros(1, 2254, 12), torch.full((1, 2254, 1), -100.0)
        for x, y, radius, p in self.people:
            i = int(np.linalg.norm(anchors() - (x, y), axis=1).argmin())
            ax, ay = anchors()[i]
            raw[0, i] = 224 * torch.tensor(
                [x - ax, y - radius - ay, 0.05, 0.05, x - ax, y - ay, x - ax, y - radius - ay, 0, 0, 0, 0]
            )
            scores[0, i] = logit(p)
        return [raw, scores]


class Pointer(nn.Module):
    """A landmark network that sees a body in what is red in the cut-out, nobody where nothing is.

    Points of even numbers are left of and above the middle, odd ones right of and below it, the neck is in it.
    """

    def forward(self, cuts: Tensor) -> list[Tensor]:
        red = (cuts[:, 0] > 0.9) & (cuts[:, 1] < 0.1)  # (B, 256, 256)
        points, presence = torch.zeros(len(cuts), 39, 5), torch.zeros(len(cuts), 1)
        for i, each in enumerate(red):
            if each.any():
                places = each.nonzero().float().flip(1)  # (pixels, 2)
                points[i, ::2, :2] = places.mean(0) - places.std(0)
                points[i, 1::2, :2] = places.mean(0) + places.std(0)
                presence[i] = 0.9
        points[:, :, 3] = logit(0.8)
        points[:, LEFT_WRIST, 3] = logit(0.2)
        heat = torch.full((len(cuts), 39, 64, 64), -10.0)
        return [points.flatten(1), presence, torch.zeros(1), heat, torch.zeros(1)]


def test_anchors() -> None:
    grid = anchors()
    # 28 x 28 cells of two, 14 x 14 of two, 7 x 7 of six
    assert grid.shape == (2254, 2) and 2254 == 28**2 * 2 + 14**2 * 2 + 7**2 * 6
    np.testing.assert_allclose(grid[[0, 1, 2]], [(4 / 224, 4 / 224)] * 2 + [(12 / 224, 4 / 224)])
    np.testing.assert_allclose(grid[28**2 * 2], (8 / 224, 8 / 224))
    np.testing.assert_allclose(grid[-1], (208 / 224, 208 / 224))


def test_decode() -> None:
    raw, logits = np.zeros((2254, 12)), np.full(2254, -1000.0)
    raw[0] = [22.4, 0, 44.8, 22.4, 112, 0, 0, 112, 1, 1, 2, 2]
    logits[0], logits[1] = 0, 1000
    boxes, scores = decode(raw, logits)
    x = y = 4 / 224
    np.testing.assert_allclose(boxes[0, :8], [x, y - 0.05, x + 0.2, y + 0.05, x + 0.5, y, x, y + 0.5], atol=1e-9)
    np.testing.assert_allclose(scores[:3], [0.5, 1, 0], atol=1e-9)


def test_merge_averages_by_score() -> None:
    def box(x: float) -> np.ndarray:
        return np.array([x, 0, x + 1, 1, *[x] * 8])

    boxes, scores = np.stack([box(5), box(0), box(0.2), box(0.9)]), np.array([0.6, 0.9, 0.3, 0.5])
    first, second, third = merge(boxes, scores)
    np.testing.assert_allclose(first, box((0.9 * 0 + 0.3 * 0.2) / 1.2))  # those that overlap by two thirds
    np.testing.assert_allclose(second, box(5))
    np.testing.assert_allclose(third, box(0.9))  # overlaps by a twentieth only
    assert merge(np.zeros((0, 12)), np.zeros(0)) == []
    assert len(merge(np.zeros((1, 12)), np.ones(1))) == 1


def test_region_stands_upright() -> None:
    upright = region(np.array([50.0, 60.0]), np.array([50.0, 20.0]))
    assert (upright.x, upright.y, upright.side, upright.angle) == (50, 60, 100, 0)
    np.testing.assert_allclose(
        upright.to_picture(np.array([[0, 0], [1, 1], [0.5, 0.1]])), [[0, 10], [100, 110], [50, 20]]
    )
    # lying with the head to the right: up in the cut-out is right in the picture
    lying = region(np.array([50.0, 60.0]), np.array([90.0, 60.0]))
    np.testing.assert_allclose(lying.to_picture(np.array([[0.5, 0.1], [0.9, 0.5]])), [[90, 60], [50, 100]], atol=1e-9)


@pytest.mark.parametrize("side", [100.0, 256.0, 900.0, 2500.0])  # of the last one the pixels are averaged first
@pytest.mark.parametrize("angle", [0.0, 0.7, -2.0])
def test_the_cut_out_shows_what_the_region_says(side: float, angle: float) -> None:
    picture = np.zeros((int(2.4 * side), int(2.1 * side), 3), np.uint8)
    where = Region(1.1 * side, 1.2 * side, side, angle)
    marks = np.array([[0.5, 0.5], [0.3, 0.4], [0.7, 0.75]])
    for mark in marks:
        x, y = where.to_picture(mark)
        dot(picture, x, y, side / 40)
    _, _, _, middles = cv2.connectedComponentsWithStats((cut(picture, where)[:, :, 0] > 127).astype(np.uint8))
    found = sorted(middles[1:].tolist(), key=lambda place: place[1])
    np.testing.assert_allclose(found, (marks[[1, 0, 2]] * LANDMARK_SIZE).tolist(), atol=1.2)


def test_the_border_goes_on_outside() -> None:
    picture = np.full((20, 20, 3), 200, np.uint8)
    assert (cut(picture, Region(0.0, 0.0, 80.0, 0.3)) == 200).all()


def test_refine_follows_a_sure_heat_map_only() -> None:
    heat = np.zeros((1, 3, 64, 64))
    heat[0, 0, 30, 40], heat[0, 0, 30, 42] = 0.9, 0.3
    heat[0, 1, 30, 40] = 0.4  # not sure enough
    heat[0, 2, 30, 60] = 0.9  # too far away
    places = np.full((1, 3, 2), (41.5 / 64, 31.5 / 64))
    moved = refine(places, heat)
    np.testing.assert_allclose(moved[0, 0], [(0.9 * 40 + 0.3 * 42) / 1.2 / 64, 30 / 64])
    np.testing.assert_allclose(moved[0, 1:], places[0, 1:])


@pytest.mark.parametrize(("height", "width"), [(300, 500), (400, 90), (100, 100)])
def test_from_the_picture_to_the_joints(height: int, width: int) -> None:
    picture = np.full((height, width, 3), 90, np.uint8)
    spot = np.array([0.6 * width, 0.45 * height])
    dot(picture, *spot, 3)
    side = max(height, width)
    # the square around the picture begins above it or left of it
    hips = (spot + np.array([side - width, side - height]) / 2) / side
    finder = Finder((hips[0] + 0.01, hips[1] + 0.02, 0.1, 0.9))
    (person,) = BlazePose(finder, Pointer()).keypoints(picture)
    np.testing.assert_allclose(person[1, :2], spot, atol=1)  # the neck
    assert (person[0, :2] < spot).all() and (person[5, :2] > spot).all()  # nose and left shoulder
    assert person[7, 2] == pytest.approx(0.2) and person[0, 2] == pytest.approx(0.8)
    # black around the picture, -1 to 1
    assert finder.seen.shape == (1, 3, 224, 224) and finder.seen.min() >= -1 and finder.seen.max() <= 1
    if height != width:
        assert (finder.seen[0, :, 0, 0] == -1).all()


def test_several_people_and_doubts() -> None:
    picture = np.full((200, 200, 3), 90, np.uint8)
    dot(picture, 50, 100, 9)
    dot(picture, 150, 100, 9)
    left, right = (0.25, 0.5, 0.1, 0.7), (0.75, 0.5, 0.1, 0.9)
    nobody, unsure = (0.5, 0.85, 0.06, 0.95), (0.25, 0.3, 0.1, 0.4)
    network = BlazePose(Finder(left, right, nobody, unsure), Pointer())
    found = network.keypoints(picture)
    np.testing.assert_allclose(found[:, 1, 0], [150, 50], atol=1)  # the surest first, and where nobody is none
    assert network.keypoints(picture, people=1)[:, 1, 0] == pytest.approx(150, abs=1)
    assert network.keypoints(picture, threshold=0.8).shape == (1, 18, 3)
    assert BlazePose(Finder(), Pointer()).keypoints(picture).shape == (0, 18, 3)
    # the same body found from two places is one
    twice = BlazePose(Finder(right, (0.78, 0.42, 0.13, 0.6)), Pointer())
    assert len(twice.keypoints(picture)) == 1


@pytest.mark.skipif(
    not (cache_folder() / CACHED).is_file(), reason=f"the published weights are not in the cache ({CACHED})"
)
def test_the_published_weights_find_a_toy_person() -> None:
    from scaleweaver.images import to_pil
    from scaleweaver.toybox.dataset import draw_batch

    batch = draw_batch("test", range(4), size=128)
    exact = batch.keypoints[0][0]
    picture = np.asarray(to_pil(torch.as_tensor(batch.images))[0])
    (found,) = BlazePose.load().keypoints(picture)
    errors = np.linalg.norm(found[:, :2] - exact[:, :2], axis=1)
    assert errors.max() < 0.1 * np.ptp(exact[:, 1])
