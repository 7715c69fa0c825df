"""A scene of the toy world: what stands where, under which sky, seen by which camera.

World frame: x right, y away from the camera, z up; the unit is a metre of the toy world and the ground is z = 0.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from scaleweaver.toybox.worlds import VERSION, world_of

__all__ = [
    "COLORS",
    "SIZES",
    "SPLITS",
    "VERSION",
    "Camera",
    "Person",
    "Scene",
    "Thing",
    "attributes",
    "base",
    "generator",
    "held_out_pairs",
    "is_held_out",
    "relations",
    "sample_scene",
]

SPLITS = ("train", "val", "test", "heldout")

# name -> RGB in [0, 1], as seen on a lit surface
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.06),
    "yellow": (0.98, 0.86, 0.12),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.10, 0.28, 0.86),
    "purple": (0.50, 0.16, 0.72),
    "pink": (0.98, 0.52, 0.72),
    "brown": (0.45, 0.26, 0.12),
    "white": (0.95, 0.95, 0.95),
    "black": (0.09, 0.09, 0.10),
}
SIZES: dict[str, float] = {"small": 0.65, "medium": 1.0, "large": 1.4}  # multiplies a kind's own base size


@dataclass(frozen=True)
class Thing:
    """One object; (x, y, z) is the centre of its base, z > 0 when it stands on another."""

    kind: str  # key of things.KINDS
    color: str  # key of COLORS: the main body's colour
    size: str  # key of SIZES
    finish: str  # key of stage.FINISHES
    x: float
    y: float
    z: float
    yaw: float  # radians about z
    pattern: str = "plain"  # key of stage.PATTERNS: what is drawn on the main body in a second colour


@dataclass(frozen=True)
class Person:
    """One clothed person standing on the ground at (x, y); yaw 0 faces the camera."""

    build: str  # "man" | "woman" | "boy" | "girl"
    pose: str  # key of people.POSES
    joint_noise: tuple[float, ...]  # standard normals, people.JOINT_NOISE_SIZE of them
    skin: str  # key of people.SKINS
    hair: str  # key of people.HAIR_STYLES
    hair_color: str  # key of people.HAIR_COLORS
    shirt: str  # key of COLORS
    trousers: str  # key of COLORS
    x: float
    y: float
    yaw: float


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at (0, -distance, height)."""

    height: float  # metres
    pitch: float  # radians looking down
    focal: float  # in units of half the image width
    distance: float


@dataclass(frozen=True)
class Scene:
    """Everything the renderer and the caption need."""

    items: tuple[Thing | Person, ...]
    ground: str  # key of render.GROUNDS
    sky: str  # key of render.SKIES
    sun_azimuth: float  # radians
    sun_elevation: float
    camera: Camera
    weather: str = "clear"  # key of weather.WEATHERS
    version: int = VERSION  # of the world it was drawn from


def generator(split: str, index: int, *, version: int = VERSION, stream: int = 0) -> np.random.Generator:
    """The random numbers of one picture; `stream` separates its scene (0) from its captions (1, 2, ...)."""
    world_of(version)  # complains about an unknown one
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if index < 0 or stream < 0:
        raise ValueError(f"index {index} and stream {stream} must not be negative; pictures are counted from 0")
    key = np.array([version, SPLITS.index(split)], np.uint64)
    # Philox counts up its lowest word, so two pictures never share a number
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, stream, index], np.uint64)))


def sample_scene(split: str, index: int, *, version: int = VERSION) -> Scene:
    """Scene `index` of a split: a pure function of (version, split, index).

    Scenes of "heldout" hold at least one held-out combination, scenes of the other splits hold none.
    """
    from scaleweaver.toybox.compose import compose  # compose builds on the classes above

    rng, world = generator(split, index, version=version), world_of(version)
    while True:
        scene = compose(rng, world)
        if scene is not None and bool(held_out_pairs(scene)) == (split == "heldout"):
            return scene


def is_held_out(first: str, second: str) -> bool:
    """The rule that keeps about one pair in twenty, (colour, kind) or (pose, shirt colour), out of training."""
    return zlib.crc32(f"{first} {second}".encode()) % 20 == 0


def held_out_pairs(scene: Scene) -> list[tuple[str, str]]:
    """The held-out combinations in a scene."""
    pairs = [(item.color, item.kind) if isinstance(item, Thing) else (item.pose, item.shirt) for item in scene.items]
    return [pair for pair in pairs if is_held_out(*pair)]


def relations(scene: Scene) -> list[tuple[int, str, int]]:
    """What a viewer can say of each pair of items, in one direction: (i, "left of", j)."""
    found = []
    for i, j in combinations(range(len(scene.items)), 2):
        one, other = scene.items[i], scene.items[j]
        dx, dy = other.x - one.x, other.y - one.y
        if base(one) > 0 or base(other) > 0:
            # what stands on top is related to its carrier only, the item right below it
            if abs(dx) + abs(dy) < 0.25:
                found.append((i, "on top of", j) if base(one) > base(other) else (j, "on top of", i))
        elif abs(dx) > 1.25 * abs(dy):
            found.append((i, "left of", j) if dx > 0 else (i, "right of", j))
        elif abs(dy) > 1.25 * abs(dx):
            found.append((i, "in front of", j) if dy > 0 else (i, "behind", j))
    return found


def attributes(scene: Scene) -> dict[str, Any]:
    """The ground truth as JSON-able data: items, count, relations, ground, sky; from version 2 on weather, version."""
    world = world_of(scene.version)
    items: list[dict[str, str]] = []
    for item in scene.items:
        kind, names = ("thing", world.thing_facts) if isinstance(item, Thing) else ("person", world.person_facts)
        items.append({"type": kind} | {name: getattr(item, name) for name in names})
    links = [list(link) for link in relations(scene)]
    facts = {name: getattr(scene, name) for name in world.scene_facts}
    return {"count": len(items), "items": items, "relations": links} | facts


def base(item: Thing | Person) -> float:
    """Height of what an item stands on, 0 on the ground."""
    return item.z if isinstance(item, Thing) else 0.0
