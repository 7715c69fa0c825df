"""Triangle meshes and the parametric shapes everything in the toy world is made of.

A mesh is four arrays; faces are counter-clockwise seen from outside, normals are per vertex and unit length, and
`material` holds one small integer per face whose meaning (a colour) belongs to the caller. z is up, shapes stand on or
around the origin, sizes are metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Profile = Sequence[Sequence[float]]  # (radius, z) or (x, z) points


@dataclass(frozen=True)
class Mesh:
    """vertices (V, 3) f32, normals (V, 3) f32, faces (F, 3) i64, material (F,) i64."""

    vertices: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    material: np.ndarray

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Mesh:
        return replace(self, vertices=self.vertices + np.array([x, y, z], np.float32))

    def scaled(self, x: float, y: float | None = None, z: float | None = None) -> Mesh:
        """Scale about the origin; one number scales all axes. A mirrored mesh keeps its faces outside."""
        scale = np.array([x, x if y is None else y, x if z is None else z], np.float32)
        faces = self.faces[:, ::-1] if scale.prod() < 0 else self.faces
        # normals follow the inverse transpose
        return replace(self, vertices=self.vertices * scale, normals=_unit(self.normals / scale), faces=faces)

    def turned(self, axis: str, degrees: float) -> Mesh:
        rotation = turn(axis, degrees).T
        return replace(self, vertices=self.vertices @ rotation, normals=self.normals @ rotation)

    def painted(self, material: int) -> Mesh:
        return replace(self, material=np.full(len(self.faces), material, np.int64))

    def faceted(self) -> Mesh:
        """The same surface with one flat normal per face."""
        corners = self.vertices[self.faces]  # (F, 3, 3)
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # (F, 3)
        vertices = corners.reshape(-1, 3)
        faces = np.arange(len(vertices), dtype=np.int64).reshape(-1, 3)
        return Mesh(vertices, np.repeat(_unit(normals), 3, axis=0), faces, self.material)


def merge(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts[:-1], strict=True)]),
        np.concatenate([mesh.material for mesh in meshes]),
    )


def turn(axis: str, degrees: float) -> np.ndarray:
    """Right-handed rotation matrix (3, 3) about "x", "y" or "z"."""
    if axis not in ("x", "y", "z"):
        raise ValueError(f'axis is {axis!r}; pass "x", "y" or "z"')
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3, dtype=np.float32)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[i, j], matrix[j, i] = -sine, sine
    return matrix


def lathe(profile: Profile, segments: int = 20, *, crease: float = 42.0) -> Mesh:
    """Turn a (radius, z) line about the z axis.

    The outside lies to the right of the line, so a solid runs from its lowest point upwards. Corners sharper than
    `crease` degrees stay sharp, the others are shaded smooth.
    """
    line = np.asarray(profile, np.float64)
    step = np.diff(line, axis=0)
    keep = np.hypot(step[:, 0], step[:, 1]) > 1e-9
    line, step = line[np.concatenate([[True], keep])], step[keep]
    outward = _unit(np.stack([step[:, 1], -step[:, 0]], axis=1))  # one normal per segment, in the (r, z) plane
    sharp = math.cos(math.radians(crease))
    closed = bool(np.allclose(line[0], line[-1]))
    last = len(step) - 1
    rings: list[tuple[float, float, float, float]] = []
    strips: list[tuple[int, int]] = []
    joined = False  # the segment before ended in a smooth corner: share its ring
    for k in range(len(step)):
        before = outward[k - 1] if k > 0 or closed else outward[k]
        after = outward[(k + 1) % len(step)] if k < last or closed else outward[k]
        if not joined:
            rings.append(_ring(line[k], outward[k] + before if outward[k] @ before > sharp else outward[k]))
        joined = bool(outward[k] @ after > sharp)
        rings.append(_ring(line[k + 1], outward[k] + after if joined else outward[k]))
        strips.append((len(rings) - 2, len(rings) - 1))
    ring = np.asarray(rings)
    angle = np.arange(segments) * (2 * math.pi / segments)
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (n, 2)
    vertices = np.concatenate([ring[:, None, :1] * around, np.repeat(ring[:, None, 1:2], segments, 1)], axis=2)
    normals = np.concatenate([ring[:, None, 2:3] * around, np.repeat(ring[:, None, 3:4], segments, 1)], axis=2)
    j = np.arange(segments)
    after_j = (j + 1) % segments
    faces = []
    for low, high in strips:
        a, b = low * segments + j, low * segments + after_j
        c, d = high * segments + after_j, high * segments + j
        if ring[low, 0] > 1e-9:
            faces.append(np.stack([a, b, c], axis=1))
        if ring[high, 0] > 1e-9:
            faces.append(np.stack([a, c, d], axis=1))
    return _mesh(vertices.reshape(-1, 3), normals.reshape(-1, 3), np.concatenate(faces))


def _ring(point: np.ndarray, normal: np.ndarray) -> tuple[float, float, float, float]:
    """Radius, height and normal of a ring; a blunt end on the axis points along the axis."""
    blunt = point[0] < 1e-9 and abs(normal[1]) > 0.7 * np.hypot(*normal)
    return float(point[0]), float(point[1]), 0.0 if blunt else float(normal[0]), float(normal[1])


def curve(points: Sequence[Sequence[float]], steps: int = 4) -> list[tuple[float, ...]]:
    """A smooth line through the points (Catmull-Rom), `steps` pieces between neighbours."""
    given = np.asarray(points, np.float64)
    padded = np.concatenate([2 * given[:1] - given[1:2], given, 2 * given[-1:] - given[-2:-1]])
    line = [tuple(given[0])]
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for t in (np.arange(steps) + 1) / steps:
            line.append(tuple(b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))))
    return line


def sphere(radius: float = 0.5, segments: int = 20) -> Mesh:
    """Centred on the origin; its normals are exact."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, segments // 2 + 1)
    mesh = lathe([(max(radius * math.cos(a), 0.0), radius * math.sin(a)) for a in angle], segments)
    return replace(mesh, normals=_unit(mesh.vertices))


def ellipsoid(x: float, y: float, z: float, segments: int = 18) -> Mesh:
    """Half axes x, y, z about the origin."""
    return sphere(1.0, segments).scaled(x, y, z)


def box(x: float, y: float, z: float, bevel: float = 0.03) -> Mesh:
    """A box x wide, y deep, z tall standing on z = 0, its edges rounded by `bevel`."""
    half = np.array([x, y, z]) / 2
    bevel = min(bevel, float(half.min()) * 0.95)
    vertices: list[np.ndarray] = []
    normals: list[np.ndarray] = []
    faces: list[np.ndarray] = []
    i, j = np.meshgrid(np.arange(3), np.arange(3), indexing="ij")
    corner = (i * 4 + j).ravel()
    quads = np.stack([corner, corner + 4, corner + 5, corner + 1], axis=1)
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for side in (-1.0, 1.0):
            grid = np.zeros((4, 4, 3))
            grid[..., axis] = side * half[axis]
            grid[..., u] = np.array([-half[u], bevel - half[u], half[u] - bevel, half[u]])[:, None]
            grid[..., v] = np.array([-half[v], bevel - half[v], half[v] - bevel, half[v]])[None, :]
            inner = np.clip(grid, bevel - half, half - bevel)
            normal = _unit(grid - inner).reshape(-1, 3)
            start = 16 * len(vertices)
            quad = quads if side > 0 else quads[:, ::-1]
            vertices.append(inner.reshape(-1, 3) + bevel * normal)
            normals.append(normal)
            faces += [start + quad[:, [0, 1, 2]], start + quad[:, [0, 2, 3]]]
    mesh = _mesh(np.concatenate(vertices), np.concatenate(normals), np.concatenate(faces))
    return mesh.moved(z=z / 2)


def cylinder(radius: float, height: float, segments: int = 20, bevel: float = 0.02) -> Mesh:
    """Standing on z = 0."""
    b = min(bevel, radius / 2, height / 2)
    line = [(0.0, 0.0), (radius - b, 0.0), (radius, b), (radius, height - b), (radius - b, height), (0.0, height)]
    return lathe(line, segments, crease=50.0)


def cone(radius: float, height: float, segments: int = 22, tip: float = 0.0) -> Mesh:
    """Standing on z = 0; `tip` is the radius at the top."""
    return lathe([(0.0, 0.0), (radius, 0.0), (tip, height), (0.0, height)], segments)


def capsule(low: float, high: float, length: float, segments: int = 14) -> Mesh:
    """A limb along +z: a ball of radius `low` at the origin, one of radius `high` at z = length, joined smoothly."""
    if length <= abs(low - high):
        raise ValueError(f"capsule of length {length} between radii {low} and {high}; make it longer than their gap")
    tilt = math.asin((low - high) / length)
    rings = max(segments // 4, 2)
    bottom = np.linspace(-math.pi / 2, tilt, rings + 1)
    top = np.linspace(tilt, math.pi / 2, rings + 1)
    line = [(low * math.cos(a), low * math.sin(a)) for a in bottom]
    line += [(high * math.cos(a), length + high * math.sin(a)) for a in top]
    line[0], line[-1] = (0.0, -low), (0.0, length + high)
    return lathe(line, segments, crease=60.0)


def torus(radius: float, thickness: float, segments: int = 28, sides: int = 12) -> Mesh:
    """A ring about the z axis, centred on the origin; `thickness` is the radius of its tube."""
    angle = np.linspace(-math.pi, math.pi, sides + 1)
    return lathe([(radius + thickness * math.cos(a), thickness * math.sin(a)) for a in angle], segments, crease=80.0)


def tube(points: Sequence[Sequence[float]], radii: float | Sequence[float], sides: int = 10) -> Mesh:
    """A round pipe through 3-D points with rounded-off ends; one radius, or one per point."""
    line = np.asarray(points, np.float64)
    radius = np.broadcast_to(np.asarray(radii, np.float64), (len(line),))
    tangent = _unit(np.gradient(line, axis=0))
    # half-ball ends: short steps outwards with a shrinking radius
    bend = np.array([math.pi / 2, math.pi / 4])
    first = line[0] - tangent[0] * (radius[0] * np.sin(bend))[:, None]
    final = line[-1] + tangent[-1] * (radius[-1] * np.sin(bend[::-1]))[:, None]
    radius = np.concatenate([radius[0] * np.cos(bend), radius, radius[-1] * np.cos(bend[::-1])])
    line = np.concatenate([first, line, final])
    tangent = _unit(np.gradient(line, axis=0))
    side = _unit(np.cross(tangent[0], [0.0, 0.0, 1.0] if abs(tangent[0][2]) < 0.9 else [1.0, 0.0, 0.0]))
    angle = np.arange(sides) * (2 * math.pi / sides)
    vertices, normals = [], []
    for point, along, r in zip(line, tangent, radius, strict=True):
        side = _unit(side - along * (side @ along))  # carried along the pipe without twisting
        other = np.cross(along, side)
        ring = np.cos(angle)[:, None] * side + np.sin(angle)[:, None] * other
        vertices.append(point + max(r, 1e-5) * ring)
        normals.append(ring)
    normals[0], normals[-1] = np.tile(-tangent[0], (sides, 1)), np.tile(tangent[-1], (sides, 1))
    j = np.arange(sides)
    faces = []
    for k in range(len(line) - 1):
        a, b = k * sides + j, k * sides + (j + 1) % sides
        faces += [np.stack([a, b, b + sides], axis=1), np.stack([a, b + sides, a + sides], axis=1)]
    return _mesh(np.concatenate(vertices), np.concatenate(normals), np.concatenate(faces))


def extrude(outline: Profile, depth: float) -> Mesh:
    """A convex (x, z) outline, counter-clockwise seen from the front (-y), pulled `depth` deep; flat faces."""
    front = np.array([(x, -depth / 2, z) for x, z in outline])
    n = len(front)
    back = front + np.array([0.0, depth, 0.0])
    j = np.arange(n)
    k = (j + 1) % n
    fan = np.stack([np.zeros(n - 2, np.int64), j[1:-1], j[2:]], axis=1)
    sides = [np.stack([j, j + n, k + n], axis=1), np.stack([j, k + n, k], axis=1)]
    vertices = np.concatenate([front, back])
    mesh = _mesh(vertices, np.zeros_like(vertices), np.concatenate([fan, fan[:, ::-1] + n, *sides]))
    return mesh.faceted()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _mesh(vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray) -> Mesh:
    return Mesh(
        np.ascontiguousarray(vertices, np.float32),
        np.ascontiguousarray(_unit(normals), np.float32),
        np.ascontiguousarray(faces, np.int64),
        np.zeros(len(faces), np.int64),
    )
