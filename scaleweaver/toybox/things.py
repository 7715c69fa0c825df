"""The things of the toy world: one small function a kind.

A kind builds its mesh at medium size, standing on z = 0 around the z axis and facing -y. Unpainted parts take the
thing's own colour ("main"); `materials.paint` gives a part one of the fixed colours. A new kind is one function, one
row in KINDS, its name in a new version of the world (`worlds`) and its nouns in `captions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from scaleweaver.toybox import newer_things as newer
from scaleweaver.toybox.materials import MATERIALS, paint
from scaleweaver.toybox.mesh import (
    Mesh,
    box,
    capsule,
    cone,
    curve,
    cylinder,
    ellipsoid,
    extrude,
    lathe,
    merge,
    sphere,
    torus,
    tube,
)

__all__ = ["KINDS", "MATERIALS", "Kind", "extent", "mesh_of"]


@dataclass(frozen=True)
class Kind:
    build: Callable[[], Mesh]
    flat_top: bool = False  # something can stand on it


@cache
def mesh_of(kind: str) -> Mesh:
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; pick one of {', '.join(KINDS)}")
    mesh = KINDS[kind].build()
    return mesh.moved(z=-float(mesh.vertices[:, 2].min()))


@cache
def extent(kind: str) -> tuple[float, float]:
    """(radius of its shadow at noon, height) in metres at medium size."""
    vertices = mesh_of(kind).vertices
    return float((vertices[:, 0] ** 2 + vertices[:, 1] ** 2).max() ** 0.5), float(vertices[:, 2].max())


def _around(mesh: Mesh, count: int, start: float = 0.0) -> list[Mesh]:
    return [mesh.turned("z", start + 360.0 * k / count) for k in range(count)]


def _cube() -> Mesh:
    return box(0.86, 0.86, 0.86, 0.05)


def _ball() -> Mesh:
    return sphere(0.48, 28).moved(z=0.48)


def _cone() -> Mesh:
    return cone(0.48, 1.1, 28, tip=0.015)


def _cylinder() -> Mesh:
    return cylinder(0.4, 0.95, 28, bevel=0.03)


def _pyramid() -> Mesh:
    return lathe([(0.0, 0.0), (0.72, 0.0), (0.0, 0.98)], 4).turned("z", 45).faceted()


def _ring() -> Mesh:
    return torus(0.37, 0.13, 32, 14).turned("x", 90).moved(z=0.5)


def _star() -> Mesh:
    # ten triangles around a raised middle, front and back
    outline = []
    for k in range(10):
        radius, angle = (0.58, 0.24)[k % 2], math.radians(90 + 36 * k)
        outline.append((radius * math.cos(angle), radius * math.sin(angle)))
    sides = []
    for k in range(10):
        (ax, az), (bx, bz) = outline[k], outline[(k + 1) % 10]
        sides.append(extrude([(0.0, 0.0), (ax, az), (bx, bz)], 0.22))
    return merge(*sides).moved(z=0.47)


def _heart() -> Mesh:
    # two leaning capsules that share their tip
    lobe = capsule(0.07, 0.29, 0.50, 18)
    return merge(*(lobe.turned("y", 33 * side) for side in (1, -1))).scaled(1.05, 0.66, 1).moved(z=0.07)


def _gift() -> Mesh:
    ribbon = [box(0.16, 0.80, 0.70, 0.02), box(0.80, 0.16, 0.70, 0.02)]
    bow = [ellipsoid(0.19, 0.09, 0.11, 14).turned("y", -28 * s).moved(x=0.16 * s, z=0.79) for s in (1, -1)]
    return merge(box(0.77, 0.77, 0.68, 0.03), *(paint(part, "sun") for part in [*ribbon, *bow]))


def _house() -> Mesh:
    walls = paint(box(0.98, 0.84, 0.62, 0.02), "cream")
    roof = extrude([(-0.62, 0.58), (0.62, 0.58), (0.0, 1.14)], 1.02)
    door = paint(box(0.22, 0.06, 0.38, 0.02).moved(y=-0.41, x=-0.02), "wood")
    window = box(0.19, 0.05, 0.19, 0.02)
    windows = [paint(window.moved(x=x, y=-0.41, z=0.27), "glass") for x in (-0.32, 0.30)]
    sides = [paint(window.turned("z", 90).moved(x=x, z=0.27), "glass") for x in (-0.48, 0.48)]
    chimney = paint(box(0.15, 0.15, 0.42, 0.02).moved(x=0.30, y=0.15, z=0.80), "brick")
    return merge(walls, roof, door, *windows, *sides, chimney)


def _tower() -> Mesh:
    body = lathe([(0.0, 0.0), (0.40, 0.0), (0.33, 0.14), (0.30, 0.92), (0.40, 1.0), (0.40, 1.14), (0, 1.14)], 24)
    teeth = [part.moved(z=1.12) for part in _around(box(0.13, 0.16, 0.17, 0.02).moved(y=0.32), 7)]
    door = paint(cylinder(0.13, 0.1, 16).turned("x", 90).scaled(1, 1, 1.3).moved(y=-0.29, z=0.15), "coal")
    windows = [paint(box(0.09, 0.1, 0.2, 0.03).moved(y=-0.29, z=0.62), "coal")]
    return merge(body, *teeth, door, *windows)


def _tree() -> Mesh:
    trunk = paint(lathe([(0.0, 0.0), (0.15, 0.0), (0.10, 0.2), (0.08, 0.8)], 12), "bark")
    crown = [(0.0, 0.0, 1.02, 0.42), (-0.28, 0.05, 0.82, 0.28), (0.28, -0.03, 0.80, 0.29), (0.03, -0.24, 0.78, 0.25)]
    return merge(trunk, *(sphere(r, 16).moved(x, y, z) for x, y, z, r in crown))


def _pine() -> Mesh:
    trunk = paint(cylinder(0.09, 0.4, 12), "bark")
    layers = [
        cone(0.50, 0.55, 18).moved(z=0.22),
        cone(0.40, 0.50, 18).moved(z=0.55),
        cone(0.28, 0.48, 18).moved(z=0.86),
    ]
    return merge(trunk, *layers)


def _car() -> Mesh:
    body = box(1.20, 0.60, 0.30, 0.10).moved(z=0.13)
    cabin = extrude([(-0.40, 0.40), (0.30, 0.40), (0.16, 0.70), (-0.28, 0.70)], 0.50)
    glass = extrude([(-0.33, 0.45), (0.22, 0.45), (0.12, 0.655), (-0.245, 0.655)], 0.52)
    post = extrude([(-0.08, 0.44), (-0.02, 0.44), (-0.02, 0.66), (-0.08, 0.66)], 0.53)
    screen = box(0.44, 0.03, 0.20, 0.01).turned("x", -25).turned("z", 90).moved(x=0.245, z=0.445)
    tyre = paint(cylinder(0.165, 0.13, 20, bevel=0.035).turned("x", 90), "coal")
    hub = paint(cylinder(0.075, 0.15, 14).turned("x", 90).moved(y=0.01), "grey")
    wheels = [
        part.moved(x, y, 0.165) for x in (-0.36, 0.36) for y in (-0.20, 0.33) for part in (tyre, hub.moved(y=0.0))
    ]
    lamps = [paint(sphere(0.06, 10).moved(0.585, y, 0.31), "glow") for y in (-0.19, 0.19)]
    return merge(body, cabin, paint(glass, "glass"), post, paint(screen, "glass"), *wheels, *lamps)


def _truck() -> Mesh:
    cab = box(0.36, 0.56, 0.52, 0.06).moved(x=0.44, z=0.14)
    window = [paint(box(0.20, 0.58, 0.18, 0.02).moved(x=0.47, z=0.42), "glass")]
    window.append(paint(box(0.04, 0.42, 0.18, 0.01).moved(x=0.61, z=0.42), "glass"))
    load = paint(box(0.82, 0.62, 0.68, 0.03).moved(x=-0.19, z=0.18), "white")
    stripe = box(0.83, 0.63, 0.16, 0.01).moved(x=-0.19, z=0.40)
    tyre = paint(cylinder(0.155, 0.14, 18, bevel=0.03).turned("x", 90), "coal")
    wheels = [tyre.moved(x, y, 0.155) for x in (-0.40, 0.42) for y in (-0.19, 0.33)]
    return merge(cab, *window, load, stripe, *wheels)


def _boat() -> Mesh:
    # the hull is a round bowl drawn out along x
    side = curve([(0.16, 0.0), (0.24, 0.08), (0.30, 0.34)], 3)
    hull = lathe([(0.0, 0.0), *side, (0.26, 0.34), (0.24, 0.27), (0.0, 0.27)], 24).scaled(2.17, 1.05, 1.0)
    mast = paint(cylinder(0.028, 1.0, 10).moved(z=0.25), "wood")
    sail = paint(extrude([(0.04, 0.44), (0.52, 0.44), (0.04, 1.20)], 0.03), "white")
    jib = paint(extrude([(-0.42, 0.44), (-0.05, 0.44), (-0.05, 1.02)], 0.03), "white")
    flag = extrude([(0.02, 1.18), (0.22, 1.24), (0.02, 1.30)], 0.02).moved(x=-0.02)
    return merge(hull, mast, sail, jib, flag)


def _rocket() -> Mesh:
    body = lathe([(0.0, 0.16), (0.17, 0.16), *curve([(0.19, 0.20), (0.25, 0.50), (0.21, 0.86)], 4)], 24)
    nose = lathe(curve([(0.213, 0.85), (0.13, 1.10), (0.0, 1.28)], 4), 24)
    fin = extrude([(0.15, 0.20), (0.42, 0.0), (0.44, 0.22), (0.20, 0.52)], 0.05)
    fins = _around(fin, 3, 90)
    jet = paint(cone(0.13, 0.12, 16, tip=0.17).turned("x", 180).moved(z=0.18), "steel")
    window = paint(ellipsoid(0.10, 0.06, 0.10, 14).moved(y=-0.21, z=0.70), "glass")
    frame = paint(torus(0.10, 0.025, 18, 8).turned("x", 90).moved(y=-0.225, z=0.70), "steel")
    return merge(paint(body, "white"), nose, *fins, jet, window, frame)


def _cup() -> Mesh:
    wall = curve([(0.26, 0.0), (0.33, 0.06), (0.36, 0.34), (0.38, 0.66)], 3)
    inside = [(0.335, 0.66), (0.31, 0.34), (0.27, 0.07), (0.0, 0.07)]
    bowl = lathe([(0.0, 0.0), *wall, *inside], 26)
    drink = paint(lathe([(0.325, 0.55), (0.0, 0.55)], 22), "bark")
    handle = tube(curve([(0.34, 0, 0.54), (0.55, 0, 0.52), (0.58, 0, 0.26), (0.34, 0, 0.16)], 5), 0.05)
    return merge(bowl, drink, handle)


def _bottle() -> Mesh:
    line = [(0.0, 0.0), (0.22, 0.0), *curve([(0.25, 0.04), (0.25, 0.56), (0.20, 0.72), (0.09, 0.86), (0.085, 1.05)], 4)]
    label = paint(lathe([(0.255, 0.18), (0.258, 0.20), (0.258, 0.46), (0.255, 0.48)], 24), "cream")
    return merge(lathe([*line, (0.0, 1.05)], 24), label, paint(cylinder(0.10, 0.12, 16).moved(z=1.02), "wood"))


def _teapot() -> Mesh:
    line = curve([(0.24, 0.0), (0.42, 0.16), (0.44, 0.34), (0.30, 0.55), (0.20, 0.60)], 4)
    body = lathe([(0.0, 0.0), *line, (0.0, 0.62)], 26)
    lid = paint(lathe([(0.22, 0.585), *curve([(0.215, 0.61), (0.14, 0.67), (0.0, 0.70)], 3)], 20), "cream")
    knob = paint(sphere(0.065, 12).moved(z=0.74), "cream")
    spout = tube(
        curve([(0.34, 0, 0.18), (0.52, 0, 0.26), (0.60, 0, 0.46), (0.72, 0, 0.56)], 4),
        [0.12 - 0.006 * k for k in range(13)],
    )
    handle = tube(curve([(-0.34, 0, 0.50), (-0.60, 0, 0.54), (-0.66, 0, 0.32), (-0.40, 0, 0.14)], 5), 0.045)
    return merge(body, lid, knob, spout, handle)


def _chair() -> Mesh:
    seat = box(0.56, 0.54, 0.09, 0.03).moved(z=0.42)
    legs = [box(0.075, 0.075, 0.44, 0.01).moved(x, y) for x in (-0.23, 0.23) for y in (-0.21, 0.21)]
    posts = [box(0.075, 0.07, 0.60, 0.02).moved(x, 0.23, 0.46) for x in (-0.23, 0.23)]
    slats = [box(0.50, 0.05, 0.13, 0.02).moved(0, 0.23, z) for z in (0.64, 0.90)]
    return merge(seat, *legs, *posts, *slats)


def _table() -> Mesh:
    top = box(1.20, 0.80, 0.09, 0.03).moved(z=0.58)
    legs = [box(0.10, 0.10, 0.60, 0.02).moved(x, y) for x in (-0.50, 0.50) for y in (-0.31, 0.31)]
    return merge(top, *legs, box(1.0, 0.62, 0.09, 0.01).moved(z=0.50))


def _lamp() -> Mesh:
    foot = paint(
        lathe([(0.0, 0.0), (0.27, 0.0), (0.27, 0.04), (0.05, 0.09), (0.035, 0.12), (0.035, 0.74)], 20), "steel"
    )
    shade = lathe([(0.40, 0.62), (0.22, 1.10), (0.19, 1.10), (0.37, 0.62), (0.40, 0.62)], 24)
    bulb = paint(sphere(0.12, 14).moved(z=0.72), "glow")
    return merge(foot, shade, bulb, paint(lathe([(0.21, 1.06), (0.0, 1.06)], 18), "glow"))


def _mushroom() -> Mesh:
    stem = paint(lathe([(0.0, 0.0), *curve([(0.20, 0.0), (0.17, 0.16), (0.13, 0.46)], 3)], 18), "cream")
    cap = lathe([(0.0, 0.42), (0.42, 0.40), *curve([(0.47, 0.46), (0.40, 0.68), (0.20, 0.84), (0.0, 0.88)], 4)], 26)
    dots = []
    for azimuth, height in ((0, 0.62), (65, 0.58), (-65, 0.60), (130, 0.64), (220, 0.60)):
        dot = ellipsoid(0.095, 0.05, 0.095, 10).turned("x", -38).moved(y=-0.40, z=height)
        dots.append(paint(dot.turned("z", azimuth), "white"))
    return merge(stem, cap, *dots, paint(ellipsoid(0.10, 0.10, 0.04, 10).moved(z=0.87), "white"))


def _snowman() -> Mesh:
    balls = [sphere(r, 22).moved(z=z) for r, z in ((0.40, 0.36), (0.29, 0.88), (0.21, 1.28))]
    nose = paint(cone(0.05, 0.26, 10).turned("x", 90).moved(y=-0.18, z=1.27), "carrot")
    dots = [(x, -0.18, 1.36, 0.035) for x in (-0.08, 0.08)] + [(0.0, -0.275, z, 0.035) for z in (0.80, 0.95)]
    coal = [paint(sphere(r, 8).moved(x, y, z), "coal") for x, y, z, r in dots]
    hat = paint(lathe([(0.0, 1.42), (0.25, 1.42), (0.25, 1.46), (0.17, 1.47), (0.16, 1.70), (0.0, 1.70)], 20), "coal")
    arms = [paint(tube([(0.24 * s, 0, 0.92), (0.62 * s, 0, 1.12)], 0.028, 8), "bark") for s in (1, -1)]
    return merge(*balls, nose, *coal, hat, *arms)


def _flower() -> Mesh:
    stem = paint(tube(curve([(0, 0, 0.0), (0.05, 0, 0.4), (0, 0, 0.84)], 4), 0.035, 8), "leaf")
    leaves = [
        paint(ellipsoid(0.20, 0.03, 0.075, 12).turned("y", -35 * s).moved(0.18 * s, 0, 0.30), "leaf") for s in (1, -1)
    ]
    petal = ellipsoid(0.14, 0.055, 0.17, 14).moved(z=0.23)
    petals = [petal.turned("y", 60 * k).moved(y=-0.02, z=0.86) for k in range(6)]
    eye = paint(ellipsoid(0.14, 0.08, 0.14, 14).moved(y=-0.05, z=0.86), "sun")
    return merge(stem, *leaves, *petals, eye)


def _cactus() -> Mesh:
    trunk = capsule(0.20, 0.18, 0.86, 18).moved(z=0.18)
    right = tube(curve([(0.12, 0, 0.46), (0.36, 0, 0.48), (0.42, 0, 0.60), (0.42, 0, 0.82)], 4), 0.10)
    left = tube(curve([(-0.12, 0, 0.62), (-0.34, 0, 0.64), (-0.40, 0, 0.74), (-0.40, 0, 1.0)], 4), 0.09)
    bloom = paint(sphere(0.09, 10).scaled(1, 1, 0.7).moved(z=1.24), "carrot")
    return merge(trunk, right, left, bloom)


def _duck() -> Mesh:
    body = lathe([(0.0, 0.0), *curve([(0.24, 0.0), (0.38, 0.16), (0.36, 0.34), (0.0, 0.46)], 4)], 24).scaled(1.35, 1, 1)
    tail = cone(0.17, 0.34, 14, tip=0.02).turned("y", -58).moved(-0.36, 0, 0.26)
    head = sphere(0.245, 20).moved(0.30, 0, 0.66)
    neck = capsule(0.22, 0.18, 0.3, 14).moved(0.26, 0, 0.34)
    beak = paint(ellipsoid(0.17, 0.12, 0.05, 14).moved(0.55, 0, 0.62), "carrot")
    eyes = [paint(sphere(0.045, 10).moved(0.43, y, 0.74), "coal") for y in (-0.17, 0.17)]
    wings = [ellipsoid(0.26, 0.07, 0.15, 14).turned("y", 12).moved(-0.06, y, 0.28) for y in (-0.36, 0.36)]
    return merge(body, tail, head, neck, beak, *eyes, *wings)


def _cat() -> Mesh:
    body = capsule(0.25, 0.19, 0.46, 18).turned("x", -8).moved(y=0.06, z=0.24)
    head = ellipsoid(0.27, 0.23, 0.23, 20).moved(y=-0.06, z=0.90)
    ears = [cone(0.10, 0.20, 10).turned("y", 18 * s).moved(0.16 * s, -0.05, 1.04) for s in (1, -1)]
    feet = [ellipsoid(0.09, 0.13, 0.07, 12).moved(0.13 * s, -0.20, 0.07) for s in (1, -1)]
    legs = [capsule(0.075, 0.09, 0.4, 12).moved(0.11 * s, -0.16, 0.08) for s in (1, -1)]
    haunches = [ellipsoid(0.13, 0.20, 0.19, 14).moved(0.19 * s, 0.06, 0.19) for s in (1, -1)]
    tail = tube(curve([(0.1, 0.26, 0.10), (0.40, 0.30, 0.12), (0.52, 0.26, 0.36), (0.46, 0.24, 0.56)], 4), 0.055)
    eyes = [paint(sphere(0.042, 10).moved(0.10 * s, -0.26, 0.94), "coal") for s in (1, -1)]
    muzzle = [paint(ellipsoid(0.12, 0.07, 0.075, 12).moved(0, -0.255, 0.83), "cream")]
    nose = [paint(sphere(0.03, 8).moved(0, -0.32, 0.86), "coal")]
    return merge(body, head, *ears, *feet, *legs, *haunches, tail, *eyes, *muzzle, *nose)


def _robot() -> Mesh:
    body = box(0.54, 0.40, 0.52, 0.06).moved(z=0.30)
    head = box(0.44, 0.36, 0.32, 0.05).moved(z=0.88)
    legs = [paint(cylinder(0.09, 0.34, 14).moved(0.15 * s), "steel") for s in (1, -1)]
    feet = [paint(box(0.22, 0.30, 0.10, 0.03).moved(0.15 * s, -0.03), "steel") for s in (1, -1)]
    arms = [
        paint(tube(curve([(0.26 * s, 0, 0.72), (0.42 * s, 0, 0.62), (0.44 * s, -0.04, 0.40)], 3), 0.065), "grey")
        for s in (1, -1)
    ]
    neck = paint(cylinder(0.10, 0.12, 12).moved(z=0.80), "steel")
    eyes = [paint(sphere(0.065, 12).moved(0.10 * s, -0.17, 1.07), "glow") for s in (1, -1)]
    mouth = paint(box(0.22, 0.04, 0.05, 0.01).moved(0, -0.175, 0.94), "coal")
    panel = paint(box(0.30, 0.04, 0.20, 0.02).moved(0, -0.195, 0.48), "white")
    antenna = [paint(cylinder(0.02, 0.18, 8).moved(z=1.18), "steel"), sphere(0.06, 12).moved(z=1.38)]
    return merge(body, head, *legs, *feet, *arms, neck, *eyes, mouth, panel, *antenna)


KINDS: dict[str, Kind] = {
    "cube": Kind(_cube, flat_top=True),
    "ball": Kind(_ball),
    "cone": Kind(_cone),
    "cylinder": Kind(_cylinder, flat_top=True),
    "pyramid": Kind(_pyramid),
    "ring": Kind(_ring),
    "star": Kind(_star),
    "heart": Kind(_heart),
    "gift": Kind(_gift),
    "house": Kind(_house),
    "tower": Kind(_tower),
    "tree": Kind(_tree),
    "pine": Kind(_pine),
    "car": Kind(_car),
    "truck": Kind(_truck, flat_top=True),
    "boat": Kind(_boat),
    "rocket": Kind(_rocket),
    "cup": Kind(_cup),
    "bottle": Kind(_bottle),
    "teapot": Kind(_teapot),
    "chair": Kind(_chair),
    "table": Kind(_table, flat_top=True),
    "lamp": Kind(_lamp),
    "mushroom": Kind(_mushroom),
    "snowman": Kind(_snowman),
    "flower": Kind(_flower),
    "cactus": Kind(_cactus),
    "duck": Kind(_duck),
    "cat": Kind(_cat),
    "robot": Kind(_robot),
    "apple": Kind(newer.apple),
    "bed": Kind(newer.bed),
    "cake": Kind(newer.cake),
    "elephant": Kind(newer.elephant),
    "hammer": Kind(newer.hammer),
    "ice cream": Kind(newer.ice_cream),
    "palm": Kind(newer.palm),
    "plane": Kind(newer.plane),
    "rabbit": Kind(newer.rabbit),
    "snail": Kind(newer.snail),
    "sofa": Kind(newer.sofa),
    "train": Kind(newer.train),
    "umbrella": Kind(newer.umbrella),
    "windmill": Kind(newer.windmill),
}
