"""Scenes of the built-in world as controls: a picture, its words, and the exact maps behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.drawing import depth_map, draw_skeleton
from scaleweaver.toybox.scene import Person, sample_scene

SPLIT = "test"  # scenes that the built-in model never saw
COUNT = 100_000


@dataclass(frozen=True)
class Scene:
    """maps: exact depth and pose; all other kinds are read off the picture by their preprocessor."""

    number: int
    prompt: str
    picture: Image.Image
    maps: Mapping[str, Image.Image]


def find_scene(number: int, kind: str) -> int:
    """The first scene from `number` on that has something to show for a kind: a pose needs somebody."""
    number %= COUNT
    while kind == "pose" and not any(isinstance(item, Person) for item in sample_scene(SPLIT, number).items):
        number += 1
    return number


@lru_cache(maxsize=32)
def render_scene(number: int, size: int) -> Scene:
    """Scene `number`, a pure function of it."""
    sample = draw_batch(SPLIT, [number], size=size)
    depth = np.repeat(depth_map(sample.depth[0].numpy())[..., None], 3, axis=2)  # (H, W, 3)
    maps = {"depth": Image.fromarray(depth), "pose": Image.fromarray(draw_skeleton(sample.keypoints[0], size))}
    return Scene(number, sample.texts[0], Image.fromarray(sample.pixels[0]), maps)
