"""Control maps of training pictures: exact where the world gives them, and varied as detectors vary.

An adapter that only ever saw exact maps breaks on those that its users have. So thresholds are drawn anew for every
map, depth is blurred, bent and noisy, joints are displaced or missed, and the cells of a palette change their size.
The variations are of our own choosing (inferred).
"""

from __future__ import annotations

import cv2
import numpy as np

from scaleweaver.control_maps import detector_of
from scaleweaver.controls.palette import palette
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.toybox.drawing import draw_skeleton
from scaleweaver.train.data import Pixels, Renders, random_canny

KINDS = ("canny", "depth", "pose", "palette")


def exact_map(config: ScaleWeaverConfig, renders: Renders, row: int) -> Pixels | None:
    """The control image (H, W, 3) that an adapter is measured with; None where the picture has none: no person."""
    if config.kind in ("canny", "palette"):
        return np.asarray(detector_of(config)(renders.image(row)))
    if config.kind == "depth":
        return renders.depth(row)
    if config.kind == "pose":
        return renders.skeleton(row)
    raise ValueError(f'control kind "{config.kind}" has no training maps; expected {", ".join(KINDS)}')


def varied_map(config: ScaleWeaverConfig, renders: Renders, row: int, rng: np.random.Generator) -> Pixels | None:
    """The control image (H, W, 3) of a picture as some detector might give it; None where there is none."""
    if config.kind == "canny":
        return random_canny(renders.image(row), rng)
    if config.kind == "palette":
        return np.asarray(palette(renders.image(row), cells=int(rng.choice((4, 8, 8, 16)))))
    if config.kind == "pose":
        points = renders.keypoints(row)
        return None if points is None else varied_skeleton(points, renders.image(row).shape[0], rng)
    exact = exact_map(config, renders, row)
    return exact if exact is None or rng.random() < 0.5 else varied_depth(exact, rng)


def varied_depth(depth: Pixels, rng: np.random.Generator) -> Pixels:
    """An exact depth map as an estimator gives it: soft, with another curve and low-frequency errors."""
    grey = depth[..., 0].astype(np.float32) / 255
    grey = cv2.GaussianBlur(grey, (0, 0), rng.uniform(0.4, 1.5)).astype(np.float32)
    grey **= rng.uniform(0.8, 1.25)
    waves = rng.normal(0, 0.03, (4, 4)).astype(np.float32)
    grey += cv2.resize(waves, grey.shape[::-1], interpolation=cv2.INTER_CUBIC)
    grey += rng.normal(0, 0.01, grey.shape).astype(np.float32)
    levels = (grey.clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=2)


def varied_skeleton(points: np.ndarray, side: int, rng: np.random.Generator) -> Pixels:
    """Key points (18, 3) drawn with joints displaced by about 1% of the picture and one in twenty missed."""
    changed = points.copy()
    changed[:, :2] += rng.normal(0, 0.008 * side, (len(points), 2))
    changed[rng.random(len(points)) < 0.05, 2] = 0
    return np.asarray(draw_skeleton(changed[None], side))
