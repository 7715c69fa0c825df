"""Scenes of the toy world -> pictures, exact depth, item masks and key points; the same code on CPU and GPU.

Conventions of a scene: sun_azimuth 0 shines from behind the camera, positive from the right, pi stands ahead; the
camera looks along +y, tilted down by its pitch; a thing's front (a house's door, a car's side) faces the camera at
yaw 0. A picture depends on its scene alone, never on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.toybox import finish, people, shade, weather
from scaleweaver.toybox.looks import GROUNDS, SKIES
from scaleweaver.toybox.raster import EMPTY, rasterise, unpack
from scaleweaver.toybox.scene import Person, Scene
from scaleweaver.toybox.stage import NEAR, Stage, build, project

__all__ = ["GROUNDS", "SKIES", "Frames", "render"]

# scenes worked on together: small on CPU so that everything stays in its caches
_TOGETHER = {"cpu": 1}
# a key point counts as visible unless something is this far in front of it (metres): joints lie inside the body
_TOLERANCE = np.array([0.06, 0.16] + 2 * [0.13, 0.12, 0.14] + 2 * [0.19, 0.14, 0.12] + [0.06] * 2 + [0.10] * 2)


@dataclass(frozen=True)
class Frames:
    """B pictures with everything known about them."""

    image: Tensor  # (B, 3, H, W) float32 in [0, 1]
    depth: Tensor  # (B, H, W) float32 metres along the view axis, inf in the sky
    ids: Tensor  # (B, H, W) int16: 0 background, i + 1 item i
    keypoints: list[np.ndarray]  # per picture (people, 18, 3): x, y in pixels, 0 outside | 1 hidden | 2 visible


@torch.inference_mode()
def render(
    scenes: Sequence[Scene], size: int = 128, supersample: int = 2, device: str | torch.device = "cpu"
) -> Frames:
    """Draw scenes at size x size; supersample 2 shades 4 samples a pixel."""
    if not scenes:
        raise ValueError("render got no scenes; pass at least one")
    if size < 8 or supersample < 1:
        raise ValueError(f"size {size} with supersample {supersample}; pass size >= 8 and supersample >= 1")
    device = torch.device(device)
    step = _TOGETHER.get(device.type, 32)
    parts = [_draw(scenes[k : k + step], size, supersample, device) for k in range(0, len(scenes), step)]
    return Frames(
        image=torch.cat([part.image for part in parts]),
        depth=torch.cat([part.depth for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        keypoints=[points for part in parts for points in part.keypoints],
    )


def _draw(scenes: Sequence[Scene], size: int, supersample: int, device: torch.device) -> Frames:
    stage = build(scenes, device)
    fine, images = size * supersample, len(scenes)
    corners = stage.screen[stage.faces]  # (F, 3, 3)
    buffer = rasterise(corners[..., :2] * fine, corners[..., 2], stage.image, images=images, size=fine)
    lights = shade.Lights(stage, fine)
    color = torch.empty(3, images * fine * fine, device=device)
    ray, at_ground = _rays(stage, fine)  # (3, B * fine * fine), (B * fine * fine,)
    covered = buffer.flatten() != EMPTY
    _draw_items(lights, buffer.flatten(), covered.nonzero()[:, 0], ray, color)
    _draw_ground(lights, (~covered & (at_ground < torch.inf)).nonzero()[:, 0], ray, at_ground, color)
    _draw_sky(lights, (~covered & (at_ground == torch.inf)).nonzero()[:, 0], ray, color)
    _draw_weather(scenes, stage, buffer, at_ground.view_as(buffer), color.view(3, images, fine, fine))
    light = shade.tone(color).view(3, images, fine, fine).transpose(0, 1)  # (B, 3, fine, fine)
    image = F.avg_pool2d(light, supersample).clamp(0, 1) ** (1 / 2.2)  # (B, 3, H, W)
    depth, ids = _coarse(stage, buffer, size, supersample)
    nearest = depth.cpu().numpy()
    points = [_seen_keypoints(scene, nearest[k]) for k, scene in enumerate(scenes)]
    return Frames(image, depth, ids, points)


def _rays(stage: Stage, size: int) -> tuple[Tensor, Tensor]:
    """Per pixel: the view ray scaled to 1 along the view axis, and the depth at which it meets the ground (or inf)."""
    _, height, focal, sine, cosine = stage.look["camera"]  # each (B,)
    images = len(height)
    across = (torch.arange(size, device=height.device) + 0.5) * (2 / size) - 1
    x = (across[None, None, :] / focal[:, None, None]).expand(images, size, size)
    up = (-across[None, :, None] / focal[:, None, None]).expand(images, size, size)
    y = cosine[:, None, None] + up * sine[:, None, None]
    z = up * cosine[:, None, None] - sine[:, None, None]
    depth = torch.where(z < -1e-4, height[:, None, None] / (-z).clamp(min=1e-4), torch.inf)
    return torch.stack([x, y, z]).flatten(1), depth.flatten()  # (3, B * size * size), (B * size * size,)


def _where(lights: shade.Lights, pixel: Tensor, ray: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """World position, unit direction to the camera, scene of each listed pixel."""
    image = pixel // (lights.size * lights.size)
    camera = lights.of("camera", image)
    along = ray[:, pixel]  # (3, N)
    position = along * depth
    position[1] -= camera[0]
    position[2] += camera[1]
    return position, -along / shade.dot(along, along).sqrt(), image


def _draw_items(lights: shade.Lights, buffer: Tensor, pixel: Tensor, ray: Tensor, color: Tensor) -> None:
    stage = lights.stage
    _, triangle = unpack(buffer[pixel])  # (N,)
    corner = stage.faces[triangle]  # (N, 3)
    size = lights.size
    x, y = (pixel % size + 0.5) / size, (pixel // size % size + 0.5) / size
    (x0, y0, k0), (x1, y1, k1), (x2, y2, k2) = (stage.screen[corner[:, k]].unbind(1) for k in range(3))
    # barycentric weights on the screen, made perspective-correct by 1/distance
    w0 = ((x1 - x) * (y2 - y) - (x2 - x) * (y1 - y)) * (1 - k0)
    w1 = ((x2 - x) * (y0 - y) - (x0 - x) * (y2 - y)) * (1 - k1)
    w2 = ((x0 - x) * (y1 - y) - (x1 - x) * (y0 - y)) * (1 - k2)
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
    depth = NEAR * area / (w0 + w1 + w2)
    n0, n1, n2 = (stage.normals[corner[:, k]].T for k in range(3))
    normal = n0 * w0 + n1 * w1 + n2 * w2  # weights share a sign; the length is taken out next
    normal = normal * (torch.sign(area) / shade.dot(normal, normal).sqrt().clamp(min=1e-12))
    position, view, image = _where(lights, pixel, ray, depth)
    material = stage.material[triangle]  # (N,)
    palette = stage.colors[:, material]  # (4, N)
    own = palette[:3]
    if stage.patterned:
        some = (stage.marks[1, material] > 0).nonzero()[:, 0]
        drawn = finish.patterned(stage.marks[:, material[some]], own[:, some], position[:, some], normal[:, some])
        own = own.index_copy(1, some, drawn)
    lit = shade.surfaces(lights, position, normal, view, own, palette[3], image)
    if stage.metal:
        some = (stage.marks[0, material] > 0).nonzero()[:, 0]
        there = (normal[:, some], view[:, some], own[:, some], lit[:, some], image[some])
        lit = lit.index_copy(1, some, shade.metallic(lights, *there))
    color[:, pixel] = shade.fog(lights, lit, depth, image)


def _draw_ground(lights: shade.Lights, pixel: Tensor, ray: Tensor, at_ground: Tensor, color: Tensor) -> None:
    depth = at_ground[pixel]
    position, _, image = _where(lights, pixel, ray, depth)
    color[:, pixel] = shade.fog(lights, shade.ground(lights, position, depth, image), depth, image)


def _draw_sky(lights: shade.Lights, pixel: Tensor, ray: Tensor, color: Tensor) -> None:
    _, view, image = _where(lights, pixel, ray, torch.ones_like(pixel, dtype=torch.float32))
    color[:, pixel] = shade.sky(lights, -view, image)


def _draw_weather(scenes: Sequence[Scene], stage: Stage, buffer: Tensor, at_ground: Tensor, color: Tensor) -> None:
    """Haze, rain and snow over the light (3, B, fine, fine) of the scenes that have any."""
    for k, scene in enumerate(scenes):
        if scene.weather == "clear":
            continue
        depth = torch.where(buffer[k] == EMPTY, at_ground[k], NEAR / (1 - unpack(buffer[k])[0]).clamp(min=1e-6))
        horizon, ambient = stage.look["horizon"][:, k], float(stage.look["ambient"][:, k].mean())
        color[:, k] = weather.over(color[:, k], depth, horizon, scene, ambient)


def _coarse(stage: Stage, buffer: Tensor, size: int, supersample: int) -> tuple[Tensor, Tensor]:
    """Depth and item numbers of whole pixels: the sample half the pixel's samples are not behind."""
    images = len(buffer)
    samples = buffer.view(images, size, supersample, size, supersample).transpose(2, 3).flatten(3)  # (B, H, W, s * s)
    chosen = samples.kthvalue(max(supersample * supersample // 2, 1), dim=3).values  # (B, H, W)
    key, triangle = unpack(chosen)
    covered = chosen != EMPTY
    _, ground = _rays(stage, size)
    depth = torch.where(covered, NEAR / (1 - key).clamp(min=1e-6), ground.view_as(key))
    if not len(stage.item):
        return depth, torch.zeros_like(chosen, dtype=torch.int16)
    item = stage.item[torch.where(covered, triangle, 0)] + 1
    return depth, torch.where(covered, item, 0).to(torch.int16)


def _seen_keypoints(scene: Scene, depth: np.ndarray) -> np.ndarray:
    size = len(depth)
    found = []
    for person in scene.items:
        if not isinstance(person, Person):
            continue
        seen = project(people.keypoints(person).astype(np.float64), scene.camera)  # (18, 3)
        x, y = seen[:, 0] * size, seen[:, 1] * size
        inside = (x >= 0) & (y >= 0) & (x < size) & (y < size) & (seen[:, 2] > NEAR)
        column, row = (np.clip(np.floor(value), 0, size - 1).astype(int) for value in (x, y))
        free = depth[row, column] > seen[:, 2] - _TOLERANCE * people.scale(person)
        found.append(np.stack([x, y, np.where(inside, np.where(free, 2, 1), 0)], axis=1))
    return np.stack(found).astype(np.float32) if found else np.zeros((0, 18, 3), np.float32)
