"""Jointed toy people: builds, hair, clothes, poses, forward kinematics and their 18 key points.

A body is a tree of rigid smooth parts. At rest a person stands with hanging arms and faces -y; the person's left is +x.
Every joint turns by (flex, side, twist) degrees: flex bends forwards (a knee backwards), side moves a limb outwards and
the trunk to the person's left, twist turns a limb outwards and the trunk to the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from scaleweaver.toybox.hair import HAIR_STYLES, hair_mesh
from scaleweaver.toybox.mesh import Mesh, capsule, curve, ellipsoid, lathe, merge, sphere, tube, turn

if TYPE_CHECKING:
    from scaleweaver.toybox.scene import Person

__all__ = [
    "BUILDS",
    "HAIR_COLORS",
    "HAIR_STYLES",
    "JOINT_NOISE_SIZE",
    "KEYPOINTS",
    "MATERIALS",
    "POSES",
    "SKINS",
    "Build",
    "keypoints",
    "posed",
    "scale",
]

RGB = tuple[float, float, float]
SKINS: dict[str, RGB] = {
    "pale": (0.98, 0.82, 0.71),
    "light": (0.94, 0.74, 0.58),
    "tan": (0.82, 0.59, 0.41),
    "brown": (0.60, 0.39, 0.25),
    "dark": (0.40, 0.25, 0.17),
}
HAIR_COLORS: dict[str, RGB] = {
    "black": (0.08, 0.07, 0.08),
    "brown": (0.33, 0.19, 0.10),
    "blond": (0.95, 0.78, 0.36),
    "red": (0.76, 0.28, 0.08),
    "grey": (0.66, 0.66, 0.68),
}
# material numbers of a person's mesh; the first four colours are the person's, the others are fixed
MATERIALS = ("skin", "hair", "shirt", "trousers", "shoe", "eye", "mouth")
FIXED_COLORS: dict[str, RGB] = {"shoe": (0.20, 0.20, 0.24), "eye": (0.05, 0.04, 0.05), "mouth": (0.66, 0.24, 0.22)}
KEYPOINTS = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)

Angles = tuple[float, float, float]


@dataclass(frozen=True)
class Build:
    """Lengths in metres; widths are half widths."""

    thigh: float
    shin: float
    trunk: float  # hip joint to shoulder line
    upper_arm: float
    forearm: float
    shoulder: float
    hip: float
    waist: float
    head: float  # radius
    limb: float  # thickness of arms and legs
    sleeves: bool  # long sleeves
    shorts: bool


BUILDS: dict[str, Build] = {
    "man": Build(0.40, 0.39, 0.55, 0.29, 0.25, 0.205, 0.110, 0.172, 0.178, 1.18, sleeves=False, shorts=False),
    "woman": Build(0.40, 0.38, 0.50, 0.27, 0.24, 0.172, 0.115, 0.142, 0.176, 1.02, sleeves=True, shorts=False),
    "boy": Build(0.27, 0.25, 0.40, 0.21, 0.18, 0.150, 0.082, 0.132, 0.172, 0.96, sleeves=True, shorts=True),
    "girl": Build(0.27, 0.26, 0.39, 0.21, 0.17, 0.138, 0.082, 0.118, 0.172, 0.90, sleeves=False, shorts=False),
}

_BONES = (  # name, parent; parents come first
    ("root", -1),
    ("waist", 0),
    ("neck", 1),
    ("right shoulder", 1),
    ("right elbow", 3),
    ("left shoulder", 1),
    ("left elbow", 5),
    ("right hip", 0),
    ("right knee", 7),
    ("right ankle", 8),
    ("left hip", 0),
    ("left knee", 10),
    ("left ankle", 11),
)
_NAMES = tuple(name for name, _ in _BONES)
# degrees of one standard deviation of joint noise
_NOISE: dict[str, Angles] = {
    "waist": (4, 4, 6),
    "neck": (6, 6, 9),
    "right shoulder": (7, 7, 6),
    "left shoulder": (7, 7, 6),
    "right elbow": (7, 4, 3),
    "left elbow": (7, 4, 3),
    "right hip": (5, 3, 4),
    "left hip": (5, 3, 4),
    "right knee": (6, 0, 0),
    "left knee": (6, 0, 0),
}
JOINT_NOISE_SIZE = 3 * len(_NOISE)


def _both(name: str, angles: Angles) -> dict[str, Angles]:
    return {f"right {name}": angles, f"left {name}": angles}


_RELAXED: dict[str, Angles] = {
    **_both("shoulder", (0, 11, 0)),
    **_both("elbow", (14, 0, 0)),
    **_both("hip", (0, 5, 6)),
    **_both("knee", (0, 0, 0)),
}
POSES: dict[str, dict[str, Angles]] = {
    "standing": {},
    "waving": {"right shoulder": (0, 100, 0), "right elbow": (0, 62, 0), "neck": (0, -6, 0)},
    "arms up": {**_both("shoulder", (0, 158, 0)), **_both("elbow", (0, 8, 0))},
    "t pose": {**_both("shoulder", (0, 90, 0)), **_both("elbow", (0, 0, 0))},
    "walking": {
        "root": (3, 0, 0),
        "right shoulder": (-28, 8, 0),
        "left shoulder": (30, 8, 0),
        **_both("elbow", (24, 0, 0)),
        "right hip": (30, 3, 0),
        "right knee": (10, 0, 0),
        "left hip": (-22, 3, 0),
        "left knee": (22, 0, 0),
        "left ankle": (-14, 0, 0),
    },
    "running": {
        "root": (14, 0, 0),
        "right shoulder": (-58, 10, 0),
        "left shoulder": (52, 10, 0),
        **_both("elbow", (88, 0, 0)),
        "right hip": (74, 3, 0),
        "right knee": (82, 0, 0),
        "left hip": (-26, 3, 0),
        "left knee": (48, 0, 0),
        "left ankle": (-24, 0, 0),
    },
    "sitting": {
        "root": (-8, 0, 0),
        **_both("shoulder", (-26, 20, 0)),
        **_both("elbow", (10, 0, 0)),
        **_both("hip", (107, 14, 0)),
        **_both("knee", (50, 0, 0)),
        **_both("ankle", (-34, 0, 0)),
    },
    "kicking": {
        "root": (-10, 0, 0),
        "right shoulder": (-20, 55, 0),
        "left shoulder": (35, 60, 0),
        **_both("elbow", (15, 12, 0)),
        "right hip": (74, 22, 0),
        "right knee": (6, 0, 0),
        "left hip": (8, 4, 0),
    },
    "jumping": {
        **_both("shoulder", (0, 138, 0)),
        **_both("elbow", (0, 14, 0)),
        **_both("hip", (46, 22, 0)),
        **_both("knee", (92, 0, 0)),
        **_both("ankle", (-30, 0, 0)),
    },
    "star jump": {
        **_both("shoulder", (0, 128, 0)),
        **_both("elbow", (0, 6, 0)),
        **_both("hip", (0, 36, 0)),
        **_both("ankle", (-25, 0, 0)),
    },
    "pointing": {"left shoulder": (10, 92, 0), "left elbow": (0, 0, 0), "neck": (0, 0, 38)},
    "hands on hips": {**_both("shoulder", (-8, 48, 0)), **_both("elbow", (4, -104, 0)), **_both("hip", (0, 9, 8))},
    "dancing": {
        "waist": (0, -10, 8),
        "right shoulder": (0, 150, 0),
        "right elbow": (0, 24, 0),
        "left shoulder": (0, 66, 0),
        "left elbow": (0, -78, 0),
        "right hip": (0, 6, 0),
        "left hip": (52, 42, 0),
        "left knee": (84, 0, 0),
        "left ankle": (-25, 0, 0),
    },
    "kneeling": {
        "right hip": (94, 8, 0),
        "right knee": (94, 0, 0),
        "left hip": (0, 6, 0),
        "left knee": (90, 0, 0),
        "left ankle": (-78, 0, 0),
        "right shoulder": (28, 10, 0),
        "right elbow": (40, -10, 0),
    },
    "bowing": {"waist": (66, 0, 0), "neck": (10, 0, 0), **_both("shoulder", (58, 9, 0)), **_both("elbow", (6, 0, 0))},
    "flexing": {**_both("shoulder", (0, 88, 0)), **_both("elbow", (10, 112, 0)), **_both("hip", (0, 10, 8))},
    "balancing": {
        "root": (62, 0, 0),
        "neck": (-34, 0, 0),
        **_both("shoulder", (0, 88, 0)),
        **_both("elbow", (0, 0, 0)),
        "right hip": (62, 2, 0),
        "left hip": (-18, 4, 0),
        "left ankle": (-40, 0, 0),
    },
    "crawling": {
        "root": (84, 0, 0),
        "neck": (-40, 0, 0),
        **_both("shoulder", (88, 6, 0)),
        **_both("elbow", (0, 0, 0)),
        **_both("hip", (84, 4, 0)),
        **_both("knee", (84, 0, 0)),
        **_both("ankle", (-70, 0, 0)),
    },
    "handstand": {
        "root": (180, 0, 0),
        "neck": (-14, 0, 0),
        **_both("shoulder", (0, 168, 0)),
        **_both("elbow", (0, 0, 0)),
        **_both("hip", (0, 16, 0)),
        **_both("ankle", (-50, 0, 0)),
    },
    "lying": {
        "root": (0, 90, 0),
        "waist": (0, -6, 0),
        "neck": (0, -26, 0),
        "left shoulder": (0, 150, 0),
        "left elbow": (0, 70, 0),
        "right shoulder": (20, 16, 0),
        "right hip": (36, 8, 0),
        "right knee": (70, 0, 0),
        "left hip": (4, 0, 0),
    },
}
_LIFT = {"jumping": 0.30, "star jump": 0.26}  # metres between feet and ground


def keypoints(person: Person) -> np.ndarray:
    """(18, 3) world positions in COCO-18 OpenPose order (KEYPOINTS)."""
    build = BUILDS[person.build]
    turns, points = _place(person)
    at = {name: points[k] for k, name in enumerate(_NAMES)}
    head = turns[_NAMES.index("neck")]
    r = build.head
    centre = at["neck"] + head @ np.array([0, 0, _head_height(build)])
    face = [(0, -1.04 * r, -0.16 * r), (-0.36 * r, -0.9 * r, 0.05 * r), (0.36 * r, -0.9 * r, 0.05 * r)]
    nose, right_eye, left_eye, right_ear, left_ear = (
        centre + head @ np.array(p) for p in [*face, (-r, 0, 0), (r, 0, 0)]
    )
    wrists = [
        at[f"{side} elbow"] + turns[_NAMES.index(f"{side} elbow")] @ np.array([0, 0, -build.forearm])
        for side in ("right", "left")
    ]
    order = [nose, (at["right shoulder"] + at["left shoulder"]) / 2]
    order += [at["right shoulder"], at["right elbow"], wrists[0], at["left shoulder"], at["left elbow"], wrists[1]]
    order += [at[f"{side} {joint}"] for side in ("right", "left") for joint in ("hip", "knee", "ankle")]
    return np.stack([*order, right_eye, left_eye, right_ear, left_ear]).astype(np.float32)  # (18, 3)


def scale(person: Person) -> float:
    """How thick the person's body is, 1 for a man."""
    return BUILDS[person.build].limb


def posed(person: Person) -> Mesh:
    """The person's mesh in the world; faces carry MATERIALS numbers."""
    mesh, bone = _body(person.build, person.hair)
    turns, points = _place(person)
    turn_of = turns.astype(np.float32)[bone]  # (V, 3, 3)
    vertices = np.einsum("vij,vj->vi", turn_of, mesh.vertices) + points.astype(np.float32)[bone]
    return Mesh(vertices, np.einsum("vij,vj->vi", turn_of, mesh.normals), mesh.faces, mesh.material)


def _place(person: Person) -> tuple[np.ndarray, np.ndarray]:
    """World rotations (13, 3, 3) and joint positions (13, 3): lowest point on the ground, body centre over (x, y)."""
    turns, points = _kinematics(person)
    mesh, bone = _body(person.build, person.hair)
    height = np.einsum("vj,vj->v", turns[bone][:, 2], mesh.vertices.astype(np.float64)) + points[bone, 2]
    lift = _LIFT.get(person.pose, 0.0) * (BUILDS[person.build].thigh / 0.4)
    return turns, points + np.array([person.x, person.y, lift - height.min()])


def _kinematics(person: Person) -> tuple[np.ndarray, np.ndarray]:
    if person.pose not in POSES:
        raise ValueError(f"there is no pose {person.pose!r}; pick one of {', '.join(POSES)}")
    if len(person.joint_noise) != JOINT_NOISE_SIZE:
        raise ValueError(f"joint_noise has {len(person.joint_noise)} numbers; pass {JOINT_NOISE_SIZE} standard normals")
    angles = {**_RELAXED, **POSES[person.pose]}
    noise = np.clip(np.asarray(person.joint_noise, np.float64), -2.2, 2.2).reshape(-1, 3)
    for (name, spread), z in zip(_NOISE.items(), noise, strict=True):
        base = angles.get(name, (0.0, 0.0, 0.0))
        angles[name] = (base[0] + spread[0] * z[0], base[1] + spread[1] * z[1], base[2] + spread[2] * z[2])
        if name.endswith(("elbow", "knee")):  # they do not bend the wrong way
            angles[name] = (max(angles[name][0], 0.0), *angles[name][1:])
    offsets = _offsets(BUILDS[person.build])
    turns = np.zeros((len(_BONES), 3, 3))
    points = np.zeros((len(_BONES), 3))
    for k, (name, parent) in enumerate(_BONES):
        local = _joint(name, angles)
        if parent < 0:
            turns[k] = turn("z", np.degrees(person.yaw)) @ local
        else:
            turns[k] = turns[parent] @ local
            points[k] = points[parent] + turns[parent] @ offsets[k]
    return turns, points


def _joint(name: str, angles: Mapping[str, Angles]) -> np.ndarray:
    flex, side, twist = angles.get(name, (0.0, 0.0, 0.0))
    trunk = name in ("root", "waist", "neck")
    forwards = 1 if trunk or name.endswith("knee") else -1  # limbs hang down, the trunk points up
    outwards = -1 if name.startswith("left") else 1
    handed = -1 if name.startswith("right") else 1
    return turn("y", outwards * side) @ turn("x", forwards * flex) @ turn("z", handed * twist)


def _offsets(build: Build) -> np.ndarray:
    """Each joint's rest position relative to its parent (13, 3)."""
    waist = 0.28 * build.trunk
    chest = build.trunk - waist
    arm, leg = (0, 0, -build.upper_arm), (0, 0, -build.thigh)
    shoulder, hip = (build.shoulder, 0, chest), (build.hip, 0, 0)
    rows = [(0, 0, 0), (0, 0, waist), (0, 0, chest + 0.03), _mirror(shoulder), arm, shoulder, arm]
    rows += [_mirror(hip), leg, (0, 0, -build.shin), hip, leg, (0, 0, -build.shin)]
    return np.array(rows, np.float64)


def _mirror(point: tuple[float, float, float]) -> tuple[float, float, float]:
    return -point[0], point[1], point[2]


def _head_height(build: Build) -> float:
    return build.head * 1.18


@cache
def _body(build_name: str, hair: str) -> tuple[Mesh, np.ndarray]:
    """All parts, each in its own joint's frame, and the bone number of every vertex."""
    build = BUILDS[build_name]
    parts: list[tuple[str, str, Mesh]] = [
        ("root", "trousers", ellipsoid(build.hip + 0.07 * build.limb, 0.11 * build.limb, 0.13 * build.limb, 18)),
        ("waist", "shirt", _trunk(build)),
        ("neck", "skin", capsule(0.055, 0.055, 0.12, 12).moved(z=-0.05)),
        *(("neck", material, part) for material, part in _head(build)),
        *(("neck", "hair", part) for part in hair_mesh(hair, build.head, _head_height(build))),
    ]
    for side in ("right", "left"):
        parts += _arm(build, side) + _leg(build, side)
    meshes = [part.painted(MATERIALS.index(material)) for _, material, part in parts]
    bones = [np.full(len(part.vertices), _NAMES.index(name)) for name, _, part in parts]
    return merge(*meshes), np.concatenate(bones)


def _trunk(build: Build) -> Mesh:
    chest = 0.72 * build.trunk
    low = -0.28 * build.trunk
    hem = build.hip + 0.10 * build.limb
    line = [(hem, low - 0.02), (hem * 0.99, low + 0.06), (build.waist, 0.05), (build.shoulder, chest * 0.74)]
    line += [(build.shoulder * 0.92, chest * 0.96), (0.085, chest + 0.05)]
    smooth = [(point[0], point[1]) for point in curve(line, 4)]
    return lathe([(0.0, low + 0.02), *smooth, (0.0, chest + 0.05)], 20, crease=60).scaled(1, 0.72, 1)


def _head(build: Build) -> list[tuple[str, Mesh]]:
    r, up = build.head, _head_height(build)
    skull = ellipsoid(0.94 * r, 0.98 * r, 1.06 * r, 20).moved(z=up)
    nose = sphere(0.14 * r, 8).moved(y=-0.99 * r, z=up - 0.16 * r)
    ears = [sphere(0.2 * r, 8).scaled(0.6, 1, 1.2).moved(s * 0.94 * r, 0, up) for s in (1, -1)]
    eyes = [ellipsoid(0.14 * r, 0.10 * r, 0.20 * r, 10).moved(s * 0.36 * r, -0.86 * r, up + 0.05 * r) for s in (1, -1)]
    smile = [(x * r, (-0.93 + 0.5 * x * x) * r, up + (-0.50 + 1.2 * x * x) * r) for x in (-0.3, -0.15, 0, 0.15, 0.3)]
    mouth = tube(smile, 0.05 * r, 6)
    return [
        *(("skin", part) for part in [skull, nose, *ears]),
        *(("eye", part) for part in eyes),
        ("mouth", mouth),
    ]


def _limb(top: float, end: float, length: float) -> Mesh:
    return capsule(top, end, length, 12).turned("x", 180)


def _arm(build: Build, side: str) -> list[tuple[str, str, Mesh]]:
    s, t = (1 if side == "left" else -1), build.limb
    hand = ellipsoid(0.050 * t, 0.066 * t, 0.080 * t, 12).moved(z=-build.forearm - 0.055 * t)
    thumb = ellipsoid(0.026 * t, 0.055 * t, 0.030 * t, 8).moved(-s * 0.01, -0.06 * t, -build.forearm - 0.035 * t)
    return [
        (f"{side} shoulder", "shirt", _limb(0.078 * t, 0.060 * t, build.upper_arm)),
        (f"{side} elbow", "shirt" if build.sleeves else "skin", _limb(0.055 * t, 0.042 * t, build.forearm)),
        (f"{side} elbow", "skin", hand),
        (f"{side} elbow", "skin", thumb),
    ]


def _leg(build: Build, side: str) -> list[tuple[str, str, Mesh]]:
    t = build.limb
    shoe = ellipsoid(0.070 * t, 0.140 * t, 0.060 * t, 14).moved(y=-0.055 * t, z=-0.045 * t)
    return [
        (f"{side} hip", "trousers", _limb(0.090 * t, 0.076 * t, build.thigh)),
        (f"{side} knee", "skin" if build.shorts else "trousers", _limb(0.074 * t, 0.052 * t, build.shin)),
        (f"{side} ankle", "shoe", shoe),
        (f"{side} ankle", "shoe", sphere(0.06 * t, 10)),
    ]
