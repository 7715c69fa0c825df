"""Ground truth as pictures: skeletons in OpenPose's COCO-18 colours, depth and instance maps."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
from PIL import Image

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
_SHIFT = 4  # cv2 takes positions in sixteenths of a pixel


def draw_skeleton(keypoints: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Skeletons on black, (height, width, 3) uint8 RGB.

    `keypoints` is (people, 18, 3) or (18, 3): x and y in pixels, and a visibility; joints with visibility 0 are left
    out, hidden ones are drawn as OpenPose does. `size` is the side of a square or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    people = np.asarray(keypoints, np.float64)
    if people.shape[-2:] != (18, 3):
        raise ValueError(f"keypoints have shape {people.shape}, expected (people, 18, 3) in COCO-18 order")
    canvas = np.zeros((height, width, 3), np.uint8)
    thick = max(1, round(min(height, width) / 42))
    for person in people.reshape(-1, 18, 3):
        points = [(round(x * 2**_SHIFT), round(y * 2**_SHIFT)) for x, y in person[:, :2]]
        seen = person[:, 2] > 0
        for color, (start, end) in zip(HUES, LIMBS, strict=False):
            if seen[start] and seen[end]:
                dim = tuple(0.6 * channel for channel in color)
                cv2.line(canvas, points[start], points[end], dim, thick, cv2.LINE_AA, _SHIFT)
        for color, point, here in zip(HUES, points, seen, strict=True):
            if here:
                cv2.circle(canvas, point, round(0.6 * thick * 2**_SHIFT), color, -1, cv2.LINE_AA, _SHIFT)
    return canvas


def depth_range(depth: np.ndarray) -> tuple[float, float]:
    """(nearest, farthest) metres of what is not sky; (1, 1) for sky alone."""
    solid = depth[np.isfinite(depth)]
    return (float(solid.min()), float(solid.max())) if solid.size else (1.0, 1.0)


def depth_map(depth: np.ndarray, *, levels: int = 255) -> np.ndarray:
    """Inverse depth as grey, (H, W): `levels` for the nearest point down to 1 for the farthest, and 0 for the sky.

    `depth` is in metres with inf for the sky. 255 levels give uint8, more give uint16. With (near, far) of
    `depth_range`, metres = 1 / (1 / far + (1 / near - 1 / far) * (grey - 1) / (levels - 1)).
    """
    near, far = depth_range(depth)
    span = max(1 / near - 1 / far, 1e-12)
    inverse = (1 / np.asarray(depth, np.float64) - 1 / far) / span  # 1 near, 0 far
    grey = np.where(np.isfinite(depth), 1 + np.rint(inverse * (levels - 1)), 0)
    return grey.astype(np.uint8 if levels < 256 else np.uint16)


def ids_map(ids: np.ndarray) -> Image.Image:
    """An instance map as a palette image: index 0 is ground and sky (black), i + 1 is item i in a colour of its own."""
    image = Image.fromarray(np.asarray(ids, np.uint8))
    palette = [0, 0, 0]
    for i in range(255):
        # golden-ratio steps around the circle of hues keep neighbours apart
        palette += [round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.618034 % 1.0, 0.75, 1.0)]
    image.putpalette(palette)
    return image
