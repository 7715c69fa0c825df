"""BlazePose, people's key points without the Hub: weights from a published wheel, networks in plain torch.

"BlazePose: On-device Real-time Body Pose tracking", arXiv:2006.10204. A detector looks for people in the whole picture
made small; each of them is cut out upright, and a second network finds 33 points in the cut-out.
Both networks are MediaPipe's (Apache-2.0), and so are the steps around them. Differs from MediaPipe: several people a
picture, and large pictures are averaged before they are sampled at a few pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaleweaver.controls.openpose import from_coco_17
from scaleweaver.controls.tflite import convert, load
from scaleweaver.controls.wheels import PinnedWheel, converted

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[np.float64]

WHEEL = PinnedWheel(
    "mediapipe-0.10.21-cp311-cp311-manylinux_2_28_x86_64.whl",
    sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    needed_for="BlazePose",
)
MEMBERS = (
    "mediapipe/modules/pose_detection/pose_detection.tflite",
    "mediapipe/modules/pose_landmark/pose_landmark_full.tflite",
)
CACHED = "blazepose-0.10.21.safetensors"
DETECTOR_SIZE, LANDMARK_SIZE = 224, 256  # pixels
_GRIDS = ((8, 2), (16, 2), (32, 6))  # strides of the detector, and its anchors a cell
_OVERLAP = 0.3  # boxes that share more than this are one person
_SAME_PERSON = 0.1  # and so are key points that lie closer than this share of the person's size
_MARGIN = 1.25  # of the cut-out around the circle that the detector puts around a person
_SAMPLED = 8  # times smaller: from there on pictures are averaged first
_WINDOW = 7  # cells of the heat map that move a point
# COCO's seventeen points among the thirty-three
_COCO_17 = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)


@dataclass(frozen=True)
class Region:
    """A turned square of the picture: its middle and side in pixels, and the angle in radians."""

    x: float
    y: float
    side: float
    angle: float

    def to_picture(self, points: Array) -> Array:
        """Points (..., 2) of the square, 0 to 1 along each of its sides -> pixels of the picture."""
        sine, cosine = np.sin(self.angle), np.cos(self.angle)
        turn = np.array([[cosine, -sine], [sine, cosine]])
        turned: Array = (points - 0.5) @ turn.T
        return turned * self.side + (self.x, self.y)


class BlazePose:
    """Both networks; `people` of a picture is asked with its pixels (H, W, 3), uint8."""

    def __init__(self, detector: nn.Module, landmarks: nn.Module, device: str | torch.device = "cpu") -> None:
        self.detector = detector.to(device).eval()
        self.landmarks = landmarks.to(device).eval()
        self.device = torch.device(device)

    @classmethod
    def load(cls, device: str | torch.device = "cpu") -> Self:
        """The published weights: from the user's cache, on first use from the wheel."""
        file = converted(CACHED, WHEEL, MEMBERS, _convert)
        return cls(load(file, "detector"), load(file, "landmarks"), device)

    def keypoints(self, picture: NDArray[np.uint8], people: int = 10, threshold: float = 0.5) -> NDArray[np.float32]:
        """(people, 18, 3) in COCO-18 order, the surest first: x and y in pixels, and how likely the joint is visible.

        `threshold` is the probability from which a person is one.
        """
        found: list[NDArray[np.float32]] = []
        regions = self.detect(picture, threshold)
        for start in range(0, len(regions), people):
            points, presence = self.locate(picture, regions[start : start + people])
            for person, there in zip(points, presence, strict=True):
                body = from_coco_17(person[list(_COCO_17)])  # (18, 3)
                if there >= threshold and len(found) < people and not any(_same(body, other) for other in found):
                    found.append(body)
            if len(found) == people:
                break
        return np.stack(found) if found else np.zeros((0, 18, 3), np.float32)

    @torch.inference_mode()
    def detect(self, picture: NDArray[np.uint8], threshold: float = 0.5) -> list[Region]:
        """Where people are, the surest first."""
        height, width = picture.shape[:2]
        whole = Region(width / 2, height / 2, max(height, width), 0.0)
        square = cut(picture, whole, DETECTOR_SIZE, cv2.BORDER_CONSTANT)  # black around the picture
        raw, logits = self.detector(self._batch(square[None]) * 2 - 1)  # (1, 2254, 12), (1, 2254, 1)
        boxes, scores = decode(_float64(raw)[0], _float64(logits)[0, :, 0])
        sure = scores >= threshold
        return [region(*whole.to_picture(box[4:8].reshape(2, 2))) for box in merge(boxes[sure], scores[sure])]

    @torch.inference_mode()
    def locate(self, picture: NDArray[np.uint8], regions: list[Region]) -> tuple[Array, Array]:
        """Points (regions, 33, 3) in pixels with their visibility, and the probability (regions,) of somebody there."""
        cuts = np.stack([cut(picture, each) for each in regions])
        points, presence, _, heat, _ = self.landmarks(self._batch(cuts))  # (B, 195), (B, 1), ..., (B, 39, 64, 64)
        values = _float64(points).reshape(len(regions), -1, 5)  # x, y, z, visibility, presence
        places = refine(values[:, :33, :2] / LANDMARK_SIZE, _sigmoid(_float64(heat)[:, :33]))
        pixels = np.stack([each.to_picture(place) for each, place in zip(regions, places, strict=True)])
        visible = _sigmoid(values[:, :33, 3:4])
        return np.concatenate([pixels, visible], axis=-1), _float64(presence)[:, 0]

    def _batch(self, pictures: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]."""
        return torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255


@lru_cache
def anchors() -> Array:
    """Middles (2254, 2) of the detector's anchors, x and y from 0 to 1."""
    rows = []
    for stride, count in _GRIDS:
        cells = (np.arange(DETECTOR_SIZE // stride) + 0.5) * stride / DETECTOR_SIZE
        y, x = np.meshgrid(cells, cells, indexing="ij")
        rows.append(np.stack([x, y], axis=-1).reshape(-1, 2).repeat(count, axis=0))
    return np.concatenate(rows)


def decode(raw: Array, logits: Array) -> tuple[Array, Array]:
    """Raw answers (2254, 12) -> x0, y0, x1, y1 and four points (2254, 12), shares of the square; and scores (2254,).

    The first point is the middle of the hips, the second lies on the circle around the whole person, above the head.
    """
    values = raw / DETECTOR_SIZE
    middle, half = values[:, :2] + anchors(), values[:, 2:4] / 2
    points = values[:, 4:].reshape(-1, 4, 2) + anchors()[:, None]
    return np.concatenate([middle - half, middle + half, points.reshape(-1, 8)], axis=1), _sigmoid(logits)


def merge(boxes: Array, scores: Array) -> list[Array]:
    """Boxes with points (N, 12) -> one a person: those that overlap the surest one are averaged, weighted by score."""
    order = np.argsort(-scores, kind="stable")
    merged = []
    while order.size:
        same = _overlaps(boxes[order[0]], boxes[order]) > _OVERLAP
        same[0] = True  # whatever the box, even one without an area
        weights = scores[order[same], None]
        merged.append((boxes[order[same]] * weights).sum(0) / weights.sum())
        order = order[~same]
    return merged


def region(hips: Array, rim: Array) -> Region:
    """The square around a person whose hips are in the middle of a circle through `rim`, with the head up."""
    x, y = rim - hips
    return Region(float(hips[0]), float(hips[1]), 2 * float(np.hypot(x, y)) * _MARGIN, float(np.arctan2(x, -y)))


def cut(
    picture: NDArray[np.uint8], where: Region, size: int = LANDMARK_SIZE, border: int = cv2.BORDER_REPLICATE
) -> NDArray[np.uint8]:
    """The pixels of a region, (size, size, 3), sampled as the networks know it; outside, the border goes on."""
    factor = int(where.side / size)
    if factor >= _SAMPLED:
        # sampling alone would skip most of the pixels
        small = tuple(max(1, round(length / factor)) for length in picture.shape[1::-1])
        picture = np.asarray(cv2.resize(picture, small, interpolation=cv2.INTER_AREA), np.uint8)
        where = Region((where.x + 0.5) / factor - 0.5, (where.y + 0.5) / factor - 0.5, where.side / factor, where.angle)
    # three corners say it all; MediaPipe lets pixel 0 lie on the very edge, so no half pixels here
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    matrix = cv2.getAffineTransform((corners * size).astype(np.float32), where.to_picture(corners).astype(np.float32))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cropped = cv2.warpAffine(picture, matrix, (size, size), flags=flags, borderMode=border)
    return np.asarray(cropped, np.uint8)


def refine(places: Array, heat: Array) -> Array:
    """Points (B, N, 2) moved to the mean of their heat maps (B, N, h, w) around them, where these are sure of it."""
    height, width = heat.shape[2:]
    cells = np.floor(places * (width, height))[..., None]  # (B, N, 2, 1)
    reach = _WINDOW // 2
    columns, rows = np.arange(width), np.arange(height)
    near = (abs(columns - cells[..., 0, :]) <= reach)[..., None, :] & (abs(rows - cells[..., 1, :]) <= reach)[..., None]
    p = heat * near  # (B, N, h, w)
    total = np.maximum(p.sum((2, 3)), 1e-12)[..., None]
    mean = np.stack([(p.sum(2) * columns).sum(2), (p.sum(3) * rows).sum(2)], axis=-1) / total / (width, height)
    return np.where(p.max((2, 3))[..., None] >= 0.5, mean, places)


def _convert(files: list[Path], out: Path) -> None:
    convert(dict(zip(("detector", "landmarks"), files, strict=True)), out)


def _float64(x: Tensor) -> Array:
    return np.asarray(x.cpu(), np.float64)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -100, 100))))


def _overlaps(box: Array, boxes: Array) -> Array:
    """Intersection over union of one box with (N, 4 or more)."""
    shared: Array = (np.minimum(box[2:4], boxes[:, 2:4]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(1)
    areas: Array = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    union: Array = (box[2:4] - box[:2]).prod() + areas - shared
    return shared / np.maximum(union, 1e-12)


def _same(person: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two skeletons are one body found twice."""
    size = np.ptp(other[:, :2], axis=0).max()
    return bool(np.linalg.norm(person[:, :2] - other[:, :2], axis=1).mean() < _SAME_PERSON * size)
