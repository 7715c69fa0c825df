"""How a scene is put together: what to show, where to place it, and a camera that sees all of it.

What there is to choose from is the table of a version, see `worlds`; the random numbers are drawn in a fixed order. The
subjects are large in the frame and the camera hardly varies, so that a small model can learn the world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import TypeVar

import numpy as np

from scaleweaver.toybox.people import JOINT_NOISE_SIZE, posed
from scaleweaver.toybox.scene import SIZES, Camera, Person, Scene, Thing, base
from scaleweaver.toybox.things import KINDS, mesh_of
from scaleweaver.toybox.worlds import World

LOW_SUN = ("dawn", "morning", "sunset", "dusk")
# poses that read from the side
BEST_ASIDE = ("balancing", "bowing", "crawling", "kicking", "kneeling", "running", "sitting", "walking")
MOST_HIDDEN = 0.55  # a thing may be covered by another up to this part of its rectangle in the picture
COMPANY_SIZES = ("small", "medium")  # of things that share the picture with more than one other, or with a person
EDGE = 0.94  # all subjects lie within this part of the half picture

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Box:
    """The space an item takes, seen from its own (x, y): ranges along x and y, and its height."""

    left: float
    right: float
    near: float
    far: float
    height: float


def compose(rng: np.random.Generator, world: World) -> Scene | None:
    """One scene, or None where something hides something else too much or all is far away: draw again."""
    draw = rng.random()
    if draw < world.people:
        items, half_view = _with_person(rng, world, company=_share(rng.random(), world.company))
    else:
        count = rng.choice(len(world.things), p=world.things) + 1
        items, half_view = (_one, _two, _three, _four)[count - 1](rng, world)
    items = _centred(items, rng)
    sky = _pick(rng, sorted(world.skies))
    low, high = (0.40, 0.60) if sky in LOW_SUN else (0.65, 1.0)
    scene = Scene(
        items=tuple(items),
        ground=_pick(rng, sorted(world.grounds)),
        sky=sky,
        sun_azimuth=_between(rng, 0.3, 1.2) * _sign(rng),
        sun_elevation=_between(rng, low, high),
        camera=_camera(rng, items, half_view),
        weather=_drawn(rng, world.weathers),
        version=world.version,
    )
    return scene if _hidden(scene) < MOST_HIDDEN and _largest(scene) > world.least_filled else None


def box(item: Thing | Person) -> Box:
    """The space an item takes, wherever it stands."""
    if isinstance(item, Thing):
        return _thing_box(item.kind, item.size, item.yaw)
    return _person_box(replace(item, x=0.0, y=0.0))


def rectangle(item: Thing | Person, camera: Camera) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of an item's box in the picture, whose edges are -1 and 1."""
    size, low = box(item), base(item)
    cos, sin = math.cos(camera.pitch), math.sin(camera.pitch)
    points = []
    for x in (item.x + size.left, item.x + size.right):
        for y in (item.y + size.near, item.y + size.far):
            for z in (low, low + size.height):
                ahead, up = y + camera.distance, z - camera.height
                depth = max(cos * ahead - sin * up, 1e-3)
                points.append((camera.focal * x / depth, camera.focal * (sin * ahead + cos * up) / depth))
    across, upward = zip(*points, strict=True)
    return min(across), min(upward), max(across), max(upward)


def _one(rng: np.random.Generator, world: World) -> tuple[list[Thing | Person], float]:
    return [_thing(rng, world)], _between(rng, 0.86, 0.98)


def _two(rng: np.random.Generator, world: World) -> tuple[list[Thing | Person], float]:
    draw = rng.random()
    if draw < 0.25:
        return _stack(rng, world), _between(rng, 1.0, 1.1)
    first, second = _thing(rng, world), _thing(rng, world)
    placed = _beside(rng, first, second) if draw < 0.60 else _behind(rng, first, second)
    return placed, _between(rng, 1.15, 1.25)


def _three(rng: np.random.Generator, world: World) -> tuple[list[Thing | Person], float]:
    """A row, or a stack with something beside it."""
    if rng.random() < 0.35:
        stack = _stack(rng, world)
        placed = _beside(rng, stack[0], _thing(rng, world, COMPANY_SIZES))
        shift = placed[0].x - stack[0].x
        rider = replace(stack[1], x=stack[1].x + shift, y=stack[1].y + placed[0].y - stack[0].y)
        return [placed[0], rider, placed[1]], _between(rng, 1.3, 1.4)
    return _row(rng, [_thing(rng, world, COMPANY_SIZES) for _ in range(3)]), _between(rng, 1.35, 1.45)


def _four(rng: np.random.Generator, world: World) -> tuple[list[Thing | Person], float]:
    """A row, or a row of three that has something on top of one of them."""
    if rng.random() < 0.5:
        return _row(rng, [_thing(rng, world, COMPANY_SIZES) for _ in range(4)]), _between(rng, 1.5, 1.6)
    carrier, rider = _stack(rng, world, COMPANY_SIZES)
    below: list[Thing | Person] = [_thing(rng, world, COMPANY_SIZES) for _ in range(2)]
    place = int(rng.integers(3))
    below.insert(place, carrier)
    row = _row(rng, below)
    return [*row, replace(rider, x=row[place].x, y=row[place].y)], _between(rng, 1.4, 1.5)


def _with_person(rng: np.random.Generator, world: World, company: int) -> tuple[list[Thing | Person], float]:
    """A person alone, with a thing beside, or between two things; the person comes first."""
    person = _person(rng, world)
    if company == 0:
        return [person], _between(rng, 1.02, 1.12)
    first = _thing(rng, world, COMPANY_SIZES)
    if company == 1:
        return _beside(rng, person, first), _between(rng, 1.2, 1.3)
    left, middle, right = _row(rng, [first, person, _thing(rng, world, COMPANY_SIZES)])
    return [middle, left, right], _between(rng, 1.3, 1.4)


def _thing(
    rng: np.random.Generator, world: World, sizes: tuple[str, ...] = ("small", "medium", "medium", "large")
) -> Thing:
    return Thing(
        kind=_pick(rng, world.kinds),
        color=_pick(rng, sorted(world.colors)),
        size=_pick(rng, sizes),
        finish=_pick(rng, world.finishes),
        x=0.0,
        y=0.0,
        z=0.0,
        yaw=_between(rng, -0.7, 0.7),
        pattern=_drawn(rng, world.patterns),
    )


def _person(rng: np.random.Generator, world: World) -> Person:
    noise = tuple(float(value) for value in np.clip(rng.standard_normal(JOINT_NOISE_SIZE), -2.0, 2.0))
    pose = _pick(rng, sorted(world.poses))
    if pose in BEST_ASIDE:
        yaw = _between(rng, 0.4, 1.0) * _sign(rng)
    else:
        yaw = float(np.clip(rng.standard_normal() * 0.3, -0.7, 0.7))
    return Person(
        build=_pick(rng, sorted(world.builds)),
        pose=pose,
        joint_noise=noise,
        skin=_pick(rng, sorted(world.skins)),
        hair=_pick(rng, sorted(world.hair)),
        hair_color=_pick(rng, sorted(world.hair_colors)),
        shirt=_pick(rng, sorted(world.colors)),
        trousers=_pick(rng, sorted(world.colors)),
        x=0.0,
        y=0.0,
        yaw=yaw,
    )


def _beside(
    rng: np.random.Generator, first: Thing | Person, second: Thing | Person, *, turned: bool = True
) -> list[Thing | Person]:
    """`second` right of `first`, or left of it when `turned` allows and the coin says so; `first` stays."""
    gap = _between(rng, 0.1, 0.3)
    if turned and rng.random() < 0.5:
        x = first.x + box(first).left - gap - box(second).right
    else:
        x = first.x + box(first).right + gap - box(second).left
    return [first, replace(second, x=x, y=first.y + _between(rng, -0.12, 0.12))]


def _behind(rng: np.random.Generator, first: Thing, second: Thing) -> list[Thing | Person]:
    """One behind the other, the lower one in front where their heights differ much; a step aside keeps both in view."""
    front, back = first, second
    if box(front).height > 1.25 * box(back).height:
        front, back = back, front
    away = box(front).far - box(back).near + _between(rng, 0.15, 0.4)
    widths = box(front).right - box(front).left + box(back).right - box(back).left
    aside = _sign(rng) * min(_between(rng, 0.22, 0.37) * widths, 0.7 * away)
    back = replace(back, x=front.x + aside, y=front.y + away)
    return [front, back] if rng.random() < 0.5 else [back, front]


def _row(rng: np.random.Generator, items: Sequence[Thing | Person]) -> list[Thing | Person]:
    """The items from left to right, where the first one stands."""
    row = [items[0]]
    for item in items[1:]:
        row.append(_beside(rng, row[-1], item, turned=False)[1])
    return row


def _stack(
    rng: np.random.Generator, world: World, sizes: tuple[str, ...] = ("medium", "large")
) -> list[Thing | Person]:
    """A carrier and a small thing on top of it."""
    carriers = [kind for kind in world.kinds if KINDS[kind].flat_top]
    carrier = replace(_thing(rng, world, sizes), kind=_pick(rng, carriers))
    rider = replace(_thing(rng, world, ("small",)), z=box(carrier).height)
    return [carrier, rider]


def _centred(items: list[Thing | Person], rng: np.random.Generator) -> list[Thing | Person]:
    """Move the group so that the middle of what it covers is near the origin."""
    left = min(item.x + box(item).left for item in items)
    right = max(item.x + box(item).right for item in items)
    shift_x = _between(rng, -0.08, 0.08) - (left + right) / 2
    shift_y = -sum(item.y for item in items) / len(items)
    return [replace(item, x=item.x + shift_x, y=item.y + shift_y) for item in items]


def _camera(rng: np.random.Generator, items: list[Thing | Person], half_view: float) -> Camera:
    """Aim at the middle of the items, then step back until all of them are in the picture."""
    pitch, focal = _between(rng, 0.14, 0.22), _between(rng, 3.0, 3.2)
    aim = 0.45 * max(base(item) + box(item).height for item in items)
    reach = focal * half_view
    while True:
        camera = Camera(
            height=aim + reach * math.sin(pitch), pitch=pitch, focal=focal, distance=reach * math.cos(pitch)
        )
        if all(abs(edge) < EDGE for item in items for edge in rectangle(item, camera)):
            return camera
        reach *= 1.04


@lru_cache(maxsize=256)
def _thing_box(kind: str, size: str, yaw: float) -> Box:
    vertices = mesh_of(kind).vertices * SIZES[size]
    cos, sin = math.cos(yaw), math.sin(yaw)
    x, y = vertices[:, 0] * cos - vertices[:, 1] * sin, vertices[:, 0] * sin + vertices[:, 1] * cos
    return Box(float(x.min()), float(x.max()), float(y.min()), float(y.max()), float(vertices[:, 2].max()))


@lru_cache(maxsize=16)
def _person_box(person: Person) -> Box:
    vertices = posed(person).vertices
    low, high = vertices.min(0), vertices.max(0)
    return Box(float(low[0]), float(high[0]), float(low[1]), float(high[1]), float(high[2]))


def _hidden(scene: Scene) -> float:
    """The largest part of an item's rectangle that another one covers."""
    worst = 0.0
    for one, other in combinations(scene.items, 2):
        if base(one) != base(other):
            continue
        front, back = (one, other) if one.y < other.y else (other, one)
        a, b = rectangle(front, scene.camera), rectangle(back, scene.camera)
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        worst = max(worst, max(width, 0.0) * max(height, 0.0) / ((b[2] - b[0]) * (b[3] - b[1])))
    return worst


def _largest(scene: Scene) -> float:
    """The part of the picture's width or height that the largest item fills."""
    edges = [rectangle(item, scene.camera) for item in scene.items]
    return max(max(right - left, top - bottom) / 2 for left, bottom, right, top in edges)


def _pick(rng: np.random.Generator, choices: list[_Choice] | tuple[_Choice, ...]) -> _Choice:
    return choices[int(rng.integers(len(choices)))]


def _drawn(rng: np.random.Generator, shares: Mapping[_Choice, float]) -> _Choice:
    """One of the names by its share; where there is no choice no random number is spent."""
    return _share(rng.random(), shares) if len(shares) > 1 else next(iter(shares))


def _share(draw: float, shares: Mapping[_Choice, float]) -> _Choice:
    """The name in whose share of [0, 1) the number lies."""
    place = int(np.searchsorted(np.cumsum(list(shares.values())), draw, side="right"))
    return list(shares)[min(place, len(shares) - 1)]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0
