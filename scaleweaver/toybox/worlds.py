"""The versions of the toy world: one frozen table each of what its scenes are drawn from.

A version never changes once weights were trained on it: pictures, captions and attributes of (version, split, index)
stay what they are. What the world learns later goes into a new version, made from the last one with `replace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

VERSION = 1  # what everything uses that names no version


@dataclass(frozen=True)
class World:
    """Names are those of the renderer's tables; numbers behind a name are shares that sum to 1."""

    version: int
    kinds: tuple[str, ...]
    colors: tuple[str, ...]
    finishes: tuple[str, ...]
    patterns: Mapping[str, float]
    builds: tuple[str, ...]
    poses: tuple[str, ...]
    skins: tuple[str, ...]
    hair: tuple[str, ...]
    hair_colors: tuple[str, ...]
    grounds: tuple[str, ...]
    skies: tuple[str, ...]
    weathers: Mapping[str, float]
    people: float  # share of scenes with a person
    company: Mapping[int, float]  # number of things beside the person
    things: tuple[float, ...]  # shares of one, two, ... things where there is no person
    least_filled: float  # the largest subject fills at least this part of the picture's height or width
    thing_facts: tuple[str, ...]  # fields of a thing, a person and the scene that `scene.attributes` tells
    person_facts: tuple[str, ...]
    scene_facts: tuple[str, ...]


def _shares(**shares: float) -> Mapping[str, float]:
    return MappingProxyType(shares)


_FIRST = World(
    version=1,
    kinds=(
        "ball", "boat", "cactus", "car", "cat", "chair", "cone", "cube", "cup", "cylinder",
        "duck", "flower", "house", "mushroom", "pyramid", "rocket", "snowman", "table", "teapot", "tree",
    ),
    colors=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"),
    finishes=("matte", "glossy"),
    patterns=_shares(plain=1.0),
    builds=("man", "woman", "boy", "girl"),
    poses=(
        "standing", "waving", "arms up", "t pose", "walking", "running", "sitting", "kicking",
        "jumping", "star jump", "pointing", "hands on hips", "dancing", "kneeling", "bowing", "flexing",
    ),
    skins=("pale", "light", "tan", "brown", "dark"),
    hair=(
        "short", "bob", "long", "ponytail", "bun", "curly", "afro", "spiky", "braids", "mohawk", "bald",
    ),
    hair_colors=("black", "brown", "blond", "red", "grey"),
    grounds=("grass", "sand", "snow", "dirt", "stone", "wood", "asphalt", "carpet"),
    skies=("dawn", "morning", "noon", "sunset", "dusk", "night", "cloudy"),
    weathers=_shares(clear=1.0),
    people=0.35,
    company=MappingProxyType({1: 0.5, 0: 0.5}),
    things=(0.45, 0.40, 0.15),
    least_filled=0.3,
    thing_facts=("kind", "color", "size", "finish"),
    person_facts=("build", "pose", "skin", "hair", "hair_color", "shirt", "trousers"),
    scene_facts=("ground", "sky"),
)  # fmt: skip

_SECOND = replace(
    _FIRST,
    version=2,
    kinds=(
        *_FIRST.kinds,
        "apple", "bed", "bottle", "cake", "elephant", "gift", "hammer", "heart", "ice cream", "lamp", "palm", "pine",
        "plane", "rabbit", "ring", "robot", "snail", "sofa", "star", "tower", "train", "truck", "umbrella", "windmill",
    ),
    finishes=("matte", "glossy", "metal"),
    patterns=_shares(plain=0.56, striped=0.22, dotted=0.22),
    poses=(*_FIRST.poses, "balancing", "crawling", "handstand", "lying"),
    weathers=_shares(clear=0.64, rain=0.12, snowfall=0.12, fog=0.12),
    company=MappingProxyType({1: 0.4, 2: 0.2, 0: 0.4}),
    things=(0.36, 0.34, 0.18, 0.12),
    least_filled=0.22,
    thing_facts=(*_FIRST.thing_facts, "pattern"),
    scene_facts=(*_FIRST.scene_facts, "weather", "version"),
)  # fmt: skip

WORLDS: Mapping[int, World] = MappingProxyType({world.version: world for world in (_FIRST, _SECOND)})


def world_of(version: int) -> World:
    """The tables of a version."""
    if version not in WORLDS:
        versions = ", ".join(str(number) for number in WORLDS)
        raise ValueError(f"there is no version {version!r} of the built-in world; pick one of {versions}")
    return WORLDS[version]


def check_same_world(reader: str, known: int, asked: Mapping[str, Any] | int) -> None:
    """Refuses to let what was trained on one version of the world judge scenes of another one.

    `asked` is the version of the scenes, or what `scene.attributes` tells of one: those of version 1 name none.
    """
    found = asked if isinstance(asked, int) else asked.get("version", VERSION)
    if found != known:
        raise ValueError(
            f"{reader} knows version {known} of the built-in world and this scene is of version {found}, whose things,"
            f" poses and weather it never saw; render version {known}, or train one on version {found}"
        )
