"""Ground truth as pictures: skeletons in OpenPose's COCO-18 colours, depth and instance maps."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from scaleweaver.controls.openpose import COCO_18, HUES, LIMBS, draw_skeleton

__all__ = ["COCO_18", "HUES", "LIMBS", "depth_map", "depth_range", "draw_skeleton", "ids_map"]


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
