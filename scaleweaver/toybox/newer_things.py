"""The things that version 2 of the world brought: animals, food, furniture, tools, vehicles and a windmill.

As in `things`, a function builds a kind's mesh at medium size around the z axis, facing -y; animals and vehicles show
their side, as it says more.
"""

from __future__ import annotations

import math

from scaleweaver.toybox.materials import paint
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


def apple() -> Mesh:
    line = curve([(0.12, 0.02), (0.30, 0.08), (0.44, 0.36), (0.45, 0.56), (0.33, 0.74), (0.16, 0.76), (0.06, 0.68)], 4)
    body = lathe([(0.0, 0.06), *line, (0.0, 0.66)], 28, crease=60.0)
    stem = paint(tube(curve([(0, 0, 0.62), (0.02, 0, 0.80), (0.09, 0, 0.94)], 3), 0.035, 8), "bark")
    leaf = paint(ellipsoid(0.19, 0.10, 0.035, 14).turned("y", -24).moved(0.26, -0.02, 0.92), "leaf")
    return merge(body, stem, leaf)


def bed() -> Mesh:
    head = paint(box(0.09, 0.80, 0.78, 0.04).moved(-0.68), "wood")
    foot = paint(box(0.09, 0.80, 0.46, 0.04).moved(0.68), "wood")
    frame = paint(box(1.30, 0.76, 0.12, 0.02).moved(z=0.16), "wood")
    mattress = paint(box(1.28, 0.74, 0.16, 0.05).moved(z=0.26), "white")
    blanket = merge(box(0.86, 0.80, 0.24, 0.07).moved(0.20, 0, 0.22), box(0.16, 0.81, 0.26, 0.06).moved(-0.16, 0, 0.22))
    pillow = paint(ellipsoid(0.15, 0.28, 0.10, 16).turned("y", -18).moved(-0.46, 0, 0.47), "white")
    return merge(head, foot, frame, mattress, blanket, pillow)


def cake() -> Mesh:
    plate = paint(lathe([(0.0, 0.0), (0.30, 0.0), (0.56, 0.06), (0.56, 0.08), (0.0, 0.08)], 26), "grey")
    tiers = [cylinder(0.45, 0.34, 28, 0.04).moved(z=0.07), cylinder(0.29, 0.28, 24, 0.04).moved(z=0.40)]
    icing = [torus(0.41, 0.055, 28, 10).moved(z=0.41), torus(0.26, 0.045, 24, 10).moved(z=0.68)]
    blobs = [paint(sphere(0.055, 10).moved(0.46).turned("z", 36 * k).moved(z=0.11), "white") for k in range(10)]
    candles = [paint(cylinder(0.03, 0.22, 8).moved(x, y, 0.67), "white") for x, y in ((-0.14, 0), (0.14, 0), (0, -0.1))]
    flames = [
        paint(ellipsoid(0.035, 0.035, 0.065, 8).moved(x, y, 0.95), "carrot")
        for x, y in ((-0.14, 0), (0.14, 0), (0, -0.1))
    ]
    return merge(plate, *tiers, *(paint(part, "white") for part in icing), *blobs, *candles, *flames)


def elephant() -> Mesh:
    body = ellipsoid(0.47, 0.32, 0.34, 22).moved(-0.12, 0, 0.66)
    legs = [capsule(0.125, 0.135, 0.42, 14).moved(x, y, 0.125) for x in (-0.40, 0.12) for y in (-0.17, 0.17)]
    head = ellipsoid(0.26, 0.24, 0.27, 20).moved(0.40, 0, 0.88)
    nose = tube(
        curve([(0.56, 0, 0.86), (0.72, 0, 0.74), (0.74, 0, 0.44), (0.70, 0, 0.18), (0.80, 0, 0.10)], 4),
        [0.125 - 0.0045 * k for k in range(17)],
    )
    ears = [ellipsoid(0.21, 0.05, 0.26, 18).turned("z", -22 * s).moved(0.27, 0.25 * s, 0.90) for s in (-1, 1)]
    tusks = [
        paint(
            tube(curve([(0.58, 0.13 * s, 0.76), (0.70, 0.17 * s, 0.64), (0.82, 0.17 * s, 0.66)], 3), 0.04, 8), "white"
        )
        for s in (-1, 1)
    ]
    eyes = [paint(sphere(0.04, 10).moved(0.56, 0.17 * s, 0.96), "coal") for s in (-1, 1)]
    tail = tube(curve([(-0.56, 0, 0.72), (-0.66, 0, 0.62), (-0.68, 0, 0.46)], 3), 0.03, 8)
    return merge(body, *legs, head, nose, *ears, *tusks, *eyes, tail).moved(-0.06)


def hammer() -> Mesh:
    handle = paint(tube([(0, 0, 0.06), (0, 0, 0.40), (0, 0, 1.0)], [0.075, 0.085, 0.065], 12), "wood")
    block = box(0.30, 0.24, 0.26, 0.04).moved(z=0.88)
    neck = cylinder(0.085, 0.14, 14).turned("y", 90).moved(0.12, 0, 1.01)
    face = cylinder(0.15, 0.16, 18, 0.03).turned("y", 90).moved(0.24, 0, 1.01)
    claw = extrude([(-0.13, 0.90), (-0.13, 1.13), (-0.34, 1.10), (-0.54, 0.92), (-0.36, 0.96)][::-1], 0.20)
    return merge(handle, block, neck, face, claw)


def ice_cream() -> Mesh:
    wafer = paint(cone(0.26, 0.66, 24, tip=0.03).turned("x", 180).moved(z=0.66), "waffle")
    rim = paint(torus(0.25, 0.045, 24, 8).moved(z=0.65), "waffle")
    low, high = sphere(0.33, 22).moved(z=0.86), sphere(0.25, 20).moved(z=1.22)
    drips = [sphere(0.10, 10).moved(0.25).turned("z", 45 * k).moved(z=0.71 - 0.03 * (k % 2)) for k in range(8)]
    stick = paint(cylinder(0.045, 0.40, 10).turned("y", 32).moved(0.14, 0, 1.20), "waffle")
    cherry = paint(sphere(0.085, 12).moved(-0.03, 0, 1.50), "brick")
    return merge(wafer, rim, low, high, *drips, stick, cherry)


def palm() -> Mesh:
    trunk = paint(
        tube(curve([(-0.10, 0, 0.0), (-0.04, 0, 0.40), (0.10, 0, 1.10)], 5), [0.12 - 0.005 * k for k in range(11)]),
        "bark",
    )
    # a frond is a pipe pressed flat: its line is drawn steeper by as much beforehand
    line = [(x, 0.0, z / 0.3) for x, z in curve([(0.0, 0.0), (0.24, 0.13), (0.48, 0.06), (0.66, -0.18)], 3)]
    frond = tube(line, [0.03, 0.07, 0.10, 0.12, 0.13, 0.13, 0.12, 0.10, 0.07, 0.03]).scaled(1, 1, 0.3)
    fronds = [frond.turned("z", 15 + 360 * k / 7).moved(0.10, 0, 1.12) for k in range(7)]
    nuts = [paint(sphere(0.085, 12).moved(0.10 + x, y, 1.04), "bark") for x, y in ((-0.09, -0.08), (0.09, -0.08))]
    return merge(trunk, *fronds, *nuts)


def plane() -> Mesh:
    line = [*curve([(0.09, -0.60), (0.15, -0.25), (0.18, 0.15), (0.16, 0.42)], 4), (0.10, 0.50), (0.0, 0.51)]
    body = lathe([(0.0, -0.62), *line], 20, crease=60.0).turned("y", 90)
    wing = extrude([(-0.10, -0.74), (0.10, -0.74), (0.20, 0.0), (0.10, 0.74), (-0.10, 0.74), (-0.16, 0.0)], 0.06)
    rudder = extrude([(-0.66, 0.04), (-0.38, 0.04), (-0.54, 0.36), (-0.68, 0.36)], 0.05)
    tail = extrude([(-0.66, -0.26), (-0.54, -0.26), (-0.42, 0.0), (-0.54, 0.26), (-0.66, 0.26)], 0.04)
    flat = [part.turned("x", 90).moved(x, 0, z) for part, x, z in ((wing, 0.12, -0.04), (tail, 0.0, 0.05))]
    canopy = paint(ellipsoid(0.17, 0.11, 0.13, 16).moved(0.14, 0, 0.15), "glass")
    hub = paint(ellipsoid(0.09, 0.06, 0.06, 12).moved(0.53), "steel")
    blades = [
        paint(box(0.025, 0.075, 0.62, 0.01).moved(z=-0.31).turned("x", turn).moved(0.55), "coal") for turn in (20, 110)
    ]
    legs = [paint(cylinder(0.025, 0.24, 8).moved(0.24, 0.2 * s, -0.30), "steel") for s in (-1, 1)]
    wheels = [paint(cylinder(0.09, 0.07, 14).turned("x", 90).moved(0.24, 0.235 * s, -0.31), "coal") for s in (-1, 1)]
    return merge(body, *flat, rudder, canopy, hub, *blades, *legs, *wheels).turned("y", -9).turned("z", -38)


def rabbit() -> Mesh:
    body = ellipsoid(0.29, 0.30, 0.34, 20).moved(y=0.06, z=0.33)
    head = ellipsoid(0.24, 0.22, 0.22, 20).moved(y=-0.08, z=0.80)
    ears = [ellipsoid(0.085, 0.05, 0.31, 16).turned("y", 13 * s).moved(0.15 * s, 0, 1.20) for s in (1, -1)]
    inner = [
        paint(ellipsoid(0.05, 0.02, 0.23, 12).turned("y", 13 * s).moved(0.15 * s, -0.042, 1.19), "rose")
        for s in (1, -1)
    ]
    feet = [ellipsoid(0.11, 0.21, 0.08, 14).moved(0.18 * s, -0.20, 0.08) for s in (1, -1)]
    paws = [capsule(0.06, 0.075, 0.26, 12).turned("x", 18).moved(0.11 * s, -0.27, 0.28) for s in (1, -1)]
    belly = paint(ellipsoid(0.18, 0.10, 0.22, 16).moved(y=-0.18, z=0.34), "white")
    tail = paint(sphere(0.13, 14).moved(0.20, 0.30, 0.22), "white")
    eyes = [paint(sphere(0.042, 10).moved(0.10 * s, -0.26, 0.85), "coal") for s in (1, -1)]
    cheeks = [paint(sphere(0.085, 12).moved(0.065 * s, -0.255, 0.71), "white") for s in (1, -1)]
    nose = paint(sphere(0.035, 8).moved(0, -0.33, 0.76), "rose")
    return merge(body, head, *ears, *inner, *feet, *paws, belly, tail, *eyes, *cheeks, nose)


def snail() -> Mesh:
    # a shell is a pipe wound up towards its middle, thinner and farther out to the sides at the end
    turns = [(0.02 + 0.36 * (1 - k / 40) ** 0.8, math.radians(-100 + 22 * k), k / 40) for k in range(38)]
    line = [(r * math.cos(a), -0.09 * t, r * math.sin(a)) for r, a, t in turns]
    shell = tube(line, [0.15 * (1 - 0.72 * t) for *_, t in turns], 12)
    disc = ellipsoid(0.36, 0.16, 0.36, 22)
    shell = merge(shell, disc).moved(-0.10, 0, 0.58)
    foot = paint(ellipsoid(0.66, 0.17, 0.11, 22).moved(0.02, 0, 0.11), "waffle")
    neck = paint(
        tube(curve([(0.30, 0, 0.12), (0.52, 0, 0.20), (0.60, 0, 0.46)], 4), [0.15 - 0.004 * k for k in range(9)]),
        "waffle",
    )
    head = paint(ellipsoid(0.16, 0.15, 0.14, 16).moved(0.63, 0, 0.52), "waffle")
    stalks = [
        paint(tube([(0.63, 0.06 * s, 0.58), (0.67, 0.10 * s, 0.74), (0.72, 0.13 * s, 0.88)], 0.028, 8), "waffle")
        for s in (-1, 1)
    ]
    eyes = [paint(sphere(0.06, 10).moved(0.73, 0.13 * s, 0.91), "coal") for s in (-1, 1)]
    return merge(shell, foot, neck, head, *stalks, *eyes)


def sofa() -> Mesh:
    seat = box(1.24, 0.60, 0.26, 0.05).moved(z=0.10)
    cushions = [box(0.52, 0.50, 0.14, 0.06).moved(0.27 * s, -0.06, 0.34) for s in (-1, 1)]
    back = box(1.24, 0.20, 0.76, 0.08).moved(y=0.28, z=0.10)
    rests = [box(0.52, 0.16, 0.34, 0.07).moved(0.27 * s, 0.15, 0.46) for s in (-1, 1)]
    arms = [box(0.20, 0.70, 0.50, 0.09).moved(0.64 * s, 0, 0.10) for s in (-1, 1)]
    feet = [paint(cylinder(0.05, 0.12, 10).moved(x, y), "wood") for x in (-0.62, 0.62) for y in (-0.25, 0.28)]
    return merge(seat, *cushions, back, *rests, *arms, *feet)


def train() -> Mesh:
    boiler = cylinder(0.25, 0.86, 24, 0.04).turned("y", 90).moved(-0.22, 0, 0.56)
    bands = [paint(cylinder(0.258, 0.05, 24, 0.01).turned("y", 90).moved(x, 0, 0.56), "sun") for x in (0.06, 0.36)]
    cab = box(0.42, 0.58, 0.66, 0.04).moved(-0.42, 0, 0.28)
    roof = paint(box(0.54, 0.70, 0.09, 0.03).moved(-0.42, 0, 0.93), "coal")
    windows = [paint(box(0.22, 0.60, 0.22, 0.02).moved(-0.42, 0, 0.62), "glass")]
    frame = paint(box(1.28, 0.46, 0.14, 0.02).moved(0.02, 0, 0.22), "coal")
    chimney = paint(lathe([(0.0, 0.0), (0.09, 0.0), (0.09, 0.20), (0.16, 0.34), (0.16, 0.40), (0, 0.40)], 18), "coal")
    dome = paint(ellipsoid(0.10, 0.10, 0.13, 14).moved(0.16, 0, 0.82), "sun")
    lamp = paint(sphere(0.08, 12).moved(0.66, 0, 0.62), "glow")
    plough = paint(extrude([(0.60, 0.05), (0.86, 0.05), (0.66, 0.34), (0.60, 0.34)], 0.48), "steel")
    small = paint(cylinder(0.13, 0.08, 18).turned("x", 90), "coal")
    large = paint(cylinder(0.20, 0.08, 22).turned("x", 90), "coal")
    hub = paint(cylinder(0.07, 0.10, 12).turned("x", 90), "sun")
    wheels = []
    for y in (-0.22, 0.30):
        for wheel, x, z in ((large, -0.42, 0.20), (small, 0.04, 0.13), (small, 0.38, 0.13)):
            wheels += [wheel.moved(x, y, z), hub.moved(x, y + 0.01, z)]
    parts = [boiler, *bands, cab, roof, *windows, frame, chimney.moved(0.44, 0, 0.74), dome, lamp, plough, *wheels]
    return merge(*parts).scaled(0.94)


def umbrella() -> Mesh:
    over = curve([(0.64, 0.84), (0.52, 1.02), (0.32, 1.17), (0.03, 1.26)], 3)
    under = [(r * 0.97, z - 0.03) for r, z in reversed(over)]
    canopy = lathe([*over, (0.0, 1.26)], 8, crease=60.0)
    lining = lathe([(0.0, 1.22), *under, over[0]], 8, crease=60.0)
    pole = paint(cylinder(0.03, 1.12, 10).moved(z=0.20), "steel")
    tip = paint(cone(0.035, 0.16, 10, tip=0.01).moved(z=1.23), "steel")
    hook = paint(
        tube(curve([(0, 0, 0.34), (0, 0, 0.16), (0.08, 0, 0.05), (0.18, 0, 0.08), (0.21, 0, 0.20)], 4), 0.05), "wood"
    )
    ribs = [paint(sphere(0.035, 8).moved(0.64).turned("z", 45 * k).moved(z=0.84), "steel") for k in range(8)]
    return merge(canopy, lining, pole, tip, hook, *ribs).turned("y", 10)


def windmill() -> Mesh:
    body = lathe([(0.0, 0.0), (0.40, 0.0), (0.25, 0.96), (0.0, 0.96)], 10).faceted()
    cap = paint(lathe([(0.30, 0.95), *curve([(0.28, 1.02), (0.18, 1.16), (0.0, 1.22)], 3)], 18), "brick")
    base = paint(lathe([(0.30, 0.95), (0.0, 0.95)][::-1], 18), "brick")
    door = paint(box(0.19, 0.06, 0.34, 0.03).moved(y=-0.36), "wood")
    window = paint(box(0.13, 0.06, 0.15, 0.02).moved(y=-0.30, z=0.50), "glass")
    axle = paint(cylinder(0.07, 0.30, 14).turned("x", 90).moved(y=-0.16, z=0.98), "wood")
    spar = paint(box(0.05, 0.04, 0.66, 0.01), "wood")
    cloth = [paint(box(0.20, 0.02, 0.46, 0.008).moved(0.115, 0, 0.18), "white")]
    rungs = [paint(box(0.22, 0.035, 0.025, 0.005).moved(0.11, 0, z), "wood") for z in (0.17, 0.40, 0.63)]
    sail = merge(spar, *cloth, *rungs)
    sails = [sail.turned("y", 28 + 90 * k).moved(y=-0.42, z=0.98) for k in range(4)]
    return merge(body, base, cap, door, window, axle, *sails)
