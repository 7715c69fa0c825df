"""Scenes as flat arrays: every triangle of a batch seen by the camera, by the sun and from below the ground.

Each scene is worked out on its own in numpy, so nothing about it depends on the batch it is rendered in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scaleweaver.toybox import finish, people, things
from scaleweaver.toybox.looks import GROUNDS, SKIES
from scaleweaver.toybox.mesh import Mesh, turn
from scaleweaver.toybox.scene import COLORS, SIZES, Camera, Person, Scene, Thing
from scaleweaver.toybox.weather import WEATHERS, muted

NEAR = 0.2  # metres; triangles closer to the camera are dropped
FLOOR_SPAN = 8.5  # metres covered by the map of what touches the ground
FLOOR_HEIGHT = 0.7  # metres above ground that still darken it


@dataclass(frozen=True)
class Stage:
    """A batch of B scenes: V vertices, F triangles, M materials."""

    normals: Tensor  # (V, 3) in the world
    screen: Tensor  # (V, 3) x, y in [0, 1] across the picture (y down), 1 - NEAR/distance
    shadow: Tensor  # (V, 3) x, y, depth in [0, 1] seen from the sun
    floor: Tensor  # (V, 3) x, y, height in [0, 1] seen from below
    faces: Tensor  # (F, 3)
    image: Tensor  # (F,) scene of a triangle
    item: Tensor  # (F,) item of its scene
    material: Tensor  # (F,) row of `colors`
    colors: Tensor  # (4, M) linear red green blue, gloss
    marks: Tensor  # (MARKS, M) patterns and metal, see finish.marks_of
    patterned: bool  # whether any material has a pattern
    metal: bool
    look: dict[str, Tensor]  # numbers of each scene, name -> (numbers, B); see _look
    grounds: tuple[str, ...]


def build(scenes: Sequence[Scene], device: torch.device) -> Stage:
    parts, looks = zip(*(_scene_arrays(scene) for scene in scenes), strict=True)
    starts = np.cumsum([0] + [len(part["normals"]) for part in parts])
    palettes = np.cumsum([0] + [part["colors"].shape[1] for part in parts])

    def join(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([part[name] for part in parts])).to(device)

    def join_shifted(name: str, shifts: np.ndarray) -> Tensor:
        rows = [part[name] + shift for part, shift in zip(parts, shifts, strict=False)]
        return torch.from_numpy(np.concatenate(rows)).to(device)

    marks = np.concatenate([part["marks"] for part in parts], axis=1)
    image = np.repeat(np.arange(len(parts)), [len(part["faces"]) for part in parts])
    return Stage(
        normals=join("normals"),
        screen=join("screen"),
        shadow=join("shadow"),
        floor=join("floor"),
        faces=join_shifted("faces", starts),
        image=torch.from_numpy(image).to(device),
        item=join("item"),
        material=join_shifted("material", palettes),
        colors=torch.from_numpy(np.concatenate([part["colors"] for part in parts], axis=1)).to(device),
        marks=torch.from_numpy(marks).to(device),
        patterned=bool((marks[1] > 0).any()),
        metal=bool((marks[0] > 0).any()),
        look={name: torch.from_numpy(np.stack([look[name] for look in looks], axis=1)).to(device) for name in looks[0]},
        grounds=tuple(scene.ground for scene in scenes),
    )


def project(points: np.ndarray, camera: Camera) -> np.ndarray:
    """World (P, 3) -> x, y in [0, 1] across the picture (y down), distance along the view axis (P, 3)."""
    moved = points - np.array([0.0, -camera.distance, camera.height], points.dtype)
    view = moved @ turn("x", math.degrees(camera.pitch)).astype(points.dtype).T  # looking along +y again
    depth = view[:, 1]
    scale = camera.focal / np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    return np.stack([0.5 + 0.5 * scale * view[:, 0], 0.5 - 0.5 * scale * view[:, 2], depth], axis=1)


def sun_direction(scene: Scene) -> np.ndarray:
    """Unit vector towards the sun; azimuth 0 is behind the camera, positive to the right."""
    flat = math.cos(scene.sun_elevation)
    azimuth = scene.sun_azimuth
    return np.array([flat * math.sin(azimuth), -flat * math.cos(azimuth), math.sin(scene.sun_elevation)])


def _scene_arrays(scene: Scene) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    if scene.ground not in GROUNDS or scene.sky not in SKIES:
        raise ValueError(
            f"ground {scene.ground!r}, sky {scene.sky!r}; grounds: {', '.join(GROUNDS)}; skies: {', '.join(SKIES)}"
        )
    if scene.weather not in WEATHERS:
        raise ValueError(f"there is no weather {scene.weather!r}; pick one of {', '.join(WEATHERS)}")
    meshes, palettes = [_empty()], [np.zeros((4, 0), np.float32)]
    marks = [np.zeros((finish.MARKS, 0), np.float32)]
    item = [np.zeros(0, np.int64)]
    first = 0
    for number, thing in enumerate(scene.items):
        mesh, palette = _mesh(thing), _palette(thing)
        meshes.append(replace(mesh, material=mesh.material + first))
        palettes.append(palette)
        marks.append(_marks(thing, palette.shape[1]))
        item.append(np.full(len(mesh.faces), number))
        first += palette.shape[1]
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    vertices = np.concatenate([mesh.vertices for mesh in meshes])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)])
    material = np.concatenate([mesh.material for mesh in meshes])
    screen = project(vertices, scene.camera)
    visible = (screen[:, 2] > NEAR)[faces].all(axis=1)
    screen[:, 2] = 1 - NEAR / np.maximum(screen[:, 2], NEAR)
    to_sun, spans = _sun_view(vertices, sun_direction(scene))
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2 if len(vertices) else np.zeros(3)
    corner = middle[:2] - FLOOR_SPAN / 2
    floor = np.concatenate([(vertices[:, :2] - corner) / FLOOR_SPAN, vertices[:, 2:] / FLOOR_HEIGHT], axis=1)
    arrays = {
        "normals": np.concatenate([mesh.normals for mesh in meshes]),
        "screen": screen.astype(np.float32),
        "shadow": (vertices @ to_sun[:, :3].T + to_sun[:, 3]).astype(np.float32),
        "floor": floor.astype(np.float32),
        "faces": faces[visible],
        "item": np.concatenate(item)[visible],
        "material": material[visible],
        "colors": np.concatenate(palettes, axis=1),
        "marks": np.concatenate(marks, axis=1),
    }
    look = {
        **_look(scene),
        "sun x": to_sun[0],
        "sun y": to_sun[1],
        "sun z": to_sun[2],
        "sun spans": spans,
        "corner": corner,
    }
    return arrays, {name: numbers.astype(np.float32) for name, numbers in look.items()}


def _look(scene: Scene) -> dict[str, np.ndarray]:
    """Colours in linear light and the camera's numbers."""
    sky, ground, camera = SKIES[scene.sky], GROUNDS[scene.ground], scene.camera
    weather = WEATHERS[scene.weather]
    return {
        "camera": np.array(
            [camera.distance, camera.height, camera.focal, math.sin(camera.pitch), math.cos(camera.pitch)]
        ),
        "sun": sun_direction(scene),
        "sunlight": np.array(sky.sun) * weather.sun,
        "ambient": np.array(sky.ambient) * weather.ambient,
        "bounce": np.array(sky.bounce),
        "zenith": muted(linear(np.array(sky.zenith)), weather),
        "horizon": muted(linear(np.array(sky.horizon)), weather),
        "effects": np.array([sky.glow, sky.clouds, sky.stars]) * weather.glow,
        "ground": linear(np.array(ground.color)) * weather.ground,
        "texture": np.array([ground.detail, ground.broad]),
    }


def _sun_view(vertices: np.ndarray, sun: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World -> shadow map as a (3, 4) affine map into [0, 1], and the metres it covers (across, deep)."""
    right = np.array([sun[1], -sun[0], 0.0]) * -1.0
    right = right / np.linalg.norm(right) if np.linalg.norm(right) > 1e-6 else np.array([1.0, 0.0, 0.0])
    up = np.cross(sun, right)
    axes = np.stack([right, -up, -sun])  # seen from the sun: x right, y down, depth away
    seen = vertices.astype(np.float64) @ axes.T if len(vertices) else np.zeros((1, 3))
    low, high = seen.min(axis=0) - 0.05, seen.max(axis=0) + 0.05
    span = np.array([max(high[0] - low[0], high[1] - low[1])] * 2 + [high[2] - low[2]])
    return np.concatenate([axes, -low[:, None]], axis=1) / span[:, None], span[1:]


def _empty() -> Mesh:
    return Mesh(
        np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    )


def _mesh(item: Thing | Person) -> Mesh:
    if isinstance(item, Person):
        return people.posed(item)
    size = SIZES[item.size]
    return things.mesh_of(item.kind).scaled(size).turned("z", math.degrees(item.yaw)).moved(item.x, item.y, item.z)


def _palette(item: Thing | Person) -> np.ndarray:
    """(4, M): linear colour and gloss of each material of the item."""
    if isinstance(item, Person):
        own = [people.SKINS[item.skin], people.HAIR_COLORS[item.hair_color], COLORS[item.shirt], COLORS[item.trousers]]
        colors = [*own, *(people.FIXED_COLORS[name] for name in people.MATERIALS[4:])]
        gloss = [0.0] * len(colors)
        gloss[people.MATERIALS.index("eye")] = gloss[people.MATERIALS.index("shoe")] = 0.6
    else:
        colors = [COLORS[item.color], *list(things.MATERIALS.values())[1:]]
        gloss = [finish.finish_of(item.finish)[0]] * len(colors)
    return np.concatenate([linear(np.array(colors)).T, np.array([gloss])]).astype(np.float32)


def _marks(item: Thing | Person, materials: int) -> np.ndarray:
    """(MARKS, M): metal of every material of the item, the pattern of its main one."""
    marks = np.zeros((finish.MARKS, materials), np.float32)
    if isinstance(item, Thing):
        marks[:, 0] = finish.marks_of(
            item.finish, item.pattern, np.array(COLORS[item.color]), (item.x, item.y, item.z), item.yaw
        )
        marks[0] = marks[0, 0]
    return marks


def linear(color: np.ndarray) -> np.ndarray:
    """Display colour -> linear light."""
    return np.asarray(color, np.float64) ** 2.2
