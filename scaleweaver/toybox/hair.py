"""Hair styles of the toy people, built around a head of a given radius."""

from __future__ import annotations

import math
from collections.abc import Callable

from scaleweaver.toybox.mesh import Mesh, cone, curve, ellipsoid, lathe, sphere, tube


def hair_mesh(style: str, radius: float, height: float) -> list[Mesh]:
    """Parts of a style for a head of this radius whose centre is `height` above the neck; the face looks to -y."""
    if style not in HAIR_STYLES:
        raise ValueError(f"there is no hair style {style!r}; pick one of {', '.join(HAIR_STYLES)}")
    return [part.scaled(radius).moved(z=height) for part in HAIR_STYLES[style]()]


def _cap(front: float, size: float = 1.10) -> Mesh:
    """A bowl over the skull, tipped back so that the face stays free; unit head."""
    angle = [math.radians(a) for a in (-14, 0, 18, 36, 54, 72, 90)]
    line = [(0.86, -0.16), *((size * math.cos(a), size * math.sin(a)) for a in angle[:-1]), (0.0, size)]
    return lathe([(0.0, -0.1), *line], 20, crease=60).scaled(0.97, 1.0, 1.06).turned("x", -front).moved(y=0.04, z=0.06)


def _short() -> list[Mesh]:
    return [_cap(34.0)]


def _bob() -> list[Mesh]:
    sides = [ellipsoid(0.26, 0.50, 0.78, 12).moved(s * 0.90, 0.16, -0.30) for s in (1, -1)]
    return [_cap(32.0, 1.13), *sides, ellipsoid(0.86, 0.40, 0.86, 14).moved(y=0.66, z=-0.28)]


def _long() -> list[Mesh]:
    sides = [
        tube(curve([(s * 0.80, 0.10, 0.5), (s * 1.02, 0.16, -0.3), (s * 0.92, 0.20, -1.4)], 3), 0.24, 8)
        for s in (1, -1)
    ]
    return [_cap(30.0, 1.12), *sides, ellipsoid(0.95, 0.36, 1.45, 16).moved(y=0.66, z=-0.62)]


def _ponytail() -> list[Mesh]:
    tail = tube(
        curve([(0, 0.85, 0.72), (0, 1.45, 0.72), (0, 1.75, 0.1), (0, 1.62, -0.8)], 4),
        [0.2, *[0.33] * 8, 0.28, 0.22, 0.16, 0.08],
    )
    return [_cap(34.0), tail]


def _bun() -> list[Mesh]:
    return [_cap(34.0), sphere(0.46, 14).moved(y=0.30, z=1.34)]


def _curly() -> list[Mesh]:
    curls = []
    for ring, (count, elevation) in enumerate(((9, 4), (8, 32), (5, 62), (1, 90))):
        for k in range(count):
            azimuth = math.radians(20 * ring + 360 * k / count)
            across, up = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
            x, y, z = 1.02 * across * math.cos(azimuth), 1.02 * across * math.sin(azimuth), 1.06 * up
            if y < -0.45 and z < 0.5:  # the face stays free
                continue
            curls.append(sphere(0.40, 10).moved(x, y + 0.08, z + 0.12))
    return curls


def _afro() -> list[Mesh]:
    return [ellipsoid(1.46, 1.30, 1.30, 22).moved(y=0.52, z=0.56)]


def _spiky() -> list[Mesh]:
    spikes = []
    for count, lean, start in ((9, 68, 0), (6, 36, 15), (1, 0, 0)):
        for k in range(count):
            azimuth = start + 360 * k / count
            spike = cone(0.34, 0.62, 8, tip=0.02).moved(z=0.88).turned("y", lean).turned("z", azimuth)
            if not (lean == 68 and 215 < azimuth < 325):
                spikes.append(spike.moved(y=0.08, z=0.08))
    return [_cap(34.0), *spikes]


def _braids() -> list[Mesh]:
    braids = []
    for s in (1, -1):
        braids += [
            sphere(r, 10).moved(s * x, 0.1, z)
            for x, z, r in ((1.02, -0.25, 0.27), (1.2, -0.62, 0.26), (1.26, -1.0, 0.24), (1.24, -1.36, 0.2))
        ]
    return [_cap(32.0), *braids]


def _mohawk() -> list[Mesh]:
    return [ellipsoid(0.20, 1.05, 1.0, 16).moved(y=0.22, z=0.62)]


def _bald() -> list[Mesh]:
    return []


HAIR_STYLES: dict[str, Callable[[], list[Mesh]]] = {
    "short": _short,
    "long": _long,
    "bob": _bob,
    "ponytail": _ponytail,
    "bun": _bun,
    "curly": _curly,
    "afro": _afro,
    "spiky": _spiky,
    "braids": _braids,
    "mohawk": _mohawk,
    "bald": _bald,
}
