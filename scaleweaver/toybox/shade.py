"""Light: what colour every pixel has once it is known what it shows.

Points are lists of N pixels in (3, N) arrays; `image` (N,) says which scene each belongs to. All in linear light.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.toybox.looks import GROUNDS, TEXELS, TILE, texture
from scaleweaver.toybox.raster import EMPTY, rasterise, unpack
from scaleweaver.toybox.stage import FLOOR_HEIGHT, FLOOR_SPAN, Stage

_FLOOR_TEXELS = 160
_FOG = 30.0  # metres at which the ground has mostly turned into the horizon
_PENUMBRA = 0.065  # metres
# twelve taps spread evenly over a disc (golden angle)
_TAPS = [
    (math.sqrt((k + 0.5) / 12) * math.cos(2.39996 * k), math.sqrt((k + 0.5) / 12) * math.sin(2.39996 * k))
    for k in range(12)
]


def dot(a: Tensor, b: Tensor) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def smooth(low: float, high: float, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


class Lights:
    """The shadow map, the map of what touches the ground, and the colours of a batch of scenes."""

    def __init__(self, stage: Stage, size: int) -> None:
        images = stage.look["sun"].shape[1]
        self.stage, self.size, self.images = stage, size, images
        corners = stage.faces  # (F, 3)
        seen = stage.shadow[corners]  # (F, 3, 3)
        # the far sides cast the shadow: no light leaks and no speckles on the lit sides
        shadow = rasterise(seen[..., :2] * size, seen[..., 2], stage.image, images=images, size=size, facing=-1)
        self.shadow = torch.where(shadow == EMPTY, torch.inf, unpack(shadow)[0]).flatten()  # (B * size * size,)
        below = stage.floor[corners]
        low = (below[..., 2].amin(1) < 1).nonzero()[:, 0]
        touch = rasterise(
            below[low, :, :2] * _FLOOR_TEXELS, below[low, :, 2], stage.image[low], images=images, size=_FLOOR_TEXELS
        )
        height = unpack(touch)[0] * FLOOR_HEIGHT
        near = torch.where(touch == EMPTY, 0.0, torch.exp(-height / 0.16))[:, None]  # (B, 1, texels, texels)
        tight = F.avg_pool2d(F.avg_pool2d(near, 3, 1, 1), 3, 1, 1)
        wide = near
        for kernel, padding in (((1, 9), (0, 4)), ((9, 1), (4, 0))) * 2:
            wide = F.avg_pool2d(wide, kernel, 1, padding)
        self.touch = (0.45 * tight + 0.75 * wide).clamp(max=1)  # (B, 1, texels, texels)

    def of(self, name: str, image: Tensor) -> Tensor:
        """A scene's numbers for every pixel: (numbers, N)."""
        numbers = self.stage.look[name]
        return numbers if self.images == 1 else numbers[:, image]

    def sunshine(self, position: Tensor, normal: Tensor, image: Tensor) -> Tensor:
        """How much of the sun each point sees, 0 to 1 (N,)."""
        sun, spans = self.of("sun", image), self.of("sun spans", image)
        point = position + 0.03 * normal + 0.015 * sun
        u, v, depth = (dot(row[:3], point) + row[3] for row in (self.of(f"sun {axis}", image) for axis in "xyz"))
        u, v = u * self.size, v * self.size
        reach = _PENUMBRA * self.size / spans[0]
        base = image * (self.size * self.size)
        lit = torch.zeros_like(u)
        for dx, dy in _TAPS:
            x, y = (u + dx * reach).long().clamp(0, self.size - 1), (v + dy * reach).long().clamp(0, self.size - 1)
            lit += self.shadow[base + y * self.size + x] > depth
        inside = (u > 0) & (v > 0) & (u < self.size) & (v < self.size)
        return torch.where(inside, lit / len(_TAPS), 1.0)

    def contact(self, position: Tensor, image: Tensor) -> Tensor:
        """How open the ground is to the sky, 0 to 1 (N,)."""
        corner = self.of("corner", image)
        last = _FLOOR_TEXELS - 1
        x = ((position[0] - corner[0]) * (_FLOOR_TEXELS / FLOOR_SPAN) - 0.5).clamp(0, last - 1e-3)
        y = ((position[1] - corner[1]) * (_FLOOR_TEXELS / FLOOR_SPAN) - 0.5).clamp(0, last - 1e-3)
        column, row = x.long(), y.long()
        at = (image * _FLOOR_TEXELS + row) * _FLOOR_TEXELS + column
        fx, fy = x - column, y - row
        flat = self.touch.flatten()
        top = flat[at] * (1 - fx) + flat[at + 1] * fx
        bottom = flat[at + _FLOOR_TEXELS] * (1 - fx) + flat[at + _FLOOR_TEXELS + 1] * fx
        return 1 - (top * (1 - fy) + bottom * fy)


def surfaces(
    lights: Lights, position: Tensor, normal: Tensor, view: Tensor, color: Tensor, gloss: Tensor, image: Tensor
) -> Tensor:
    """Things and people: half-Lambert sun, sky and bounce light, rim, highlight -> (3, N)."""
    sun = lights.of("sun", image)
    facing = dot(normal, sun)
    wrap = (0.5 * facing + 0.5).clamp(0, 1)
    # shadow only where the surface looks at the sun; elsewhere half-Lambert already is dark
    shade = 1 - (1 - lights.sunshine(position, normal, image)) * smooth(-0.15, 0.2, facing)
    direct = wrap * wrap * shade
    up = 0.5 + 0.5 * normal[2]
    # the lower parts of things see less sky
    open_sky = 0.72 + 0.28 * smooth(-0.05, 0.5, position[2] + 0.35 * normal[2])
    ambient = lights.of("ambient", image)
    light = lights.of("sunlight", image) * direct + (lights.of("bounce", image) * (1 - up) + ambient * up) * open_sky
    lit = color * light
    grazing = (1 - dot(normal, view).clamp(0, 1)) ** 3
    lit = lit + ambient * (grazing * (0.22 + 0.15 * gloss) * (0.4 + 0.6 * up))
    half = sun + view
    cosine = (dot(normal, half) / dot(half, half).sqrt().clamp(min=1e-6)).clamp(0, 1)
    # cosine ** 64 by squaring
    shine = cosine * cosine
    for _ in range(5):
        shine = shine * shine
    return lit + lights.of("sunlight", image) * (shine * shade * (0.04 + 0.85 * gloss))


def metallic(lights: Lights, normal: Tensor, view: Tensor, color: Tensor, lit: Tensor, image: Tensor) -> Tensor:
    """The light of metal (3, N): it mirrors sky and ground in its own colour; `lit` is its light as a glossy thing."""
    mirrored = 2 * dot(normal, view) * normal - view
    zenith, horizon, ambient = (lights.of(name, image) for name in ("zenith", "horizon", "ambient"))
    up = mirrored[2]
    # brightest just above the horizon and darkest far below it: the contrast is what looks like metal
    sky = 0.55 * horizon + 0.45 * zenith + ambient * (0.25 + 0.95 * (1 - smooth(0.0, 0.55, up)))
    below = (0.4 * lights.of("ground", image) + 0.5 * ambient) * (0.12 + 1.3 * smooth(-0.34, 0.0, up))
    seen = below + (sky - below) * smooth(-0.03, 0.05, up)
    tint = 0.08 + 0.92 * color
    return 0.42 * lit + 0.90 * tint * seen


def ground(lights: Lights, position: Tensor, depth: Tensor, image: Tensor) -> Tensor:
    """The ground plane -> (3, N)."""
    camera, strength = lights.of("camera", image), lights.of("texture", image)
    # metres a pixel covers along the view: structure finer than that fades out
    footprint = depth * depth / (camera[1] * camera[2] * lights.size * 0.5)
    detail = _lookup(_detail_textures(lights.stage.grounds, position.device), position, image)
    broad = _lookup(_plain_texture("broad", position.device), position, torch.zeros_like(image))
    bumps = strength[0] * detail / (1 + (footprint / 0.07) ** 2) + strength[1] * broad / (1 + (footprint / 0.9) ** 2)
    color = lights.of("ground", image) * (1 + bumps).clamp(0.4, 1.8)
    sun = lights.of("sun", image)
    wrap = 0.5 * sun[2] + 0.5
    normal = torch.zeros_like(position)
    normal[2] = 1
    shade = lights.sunshine(position, normal, image)
    contact = lights.contact(position, image)
    light = lights.of("sunlight", image) * (wrap * wrap * shade) + lights.of("ambient", image)
    return color * light * (0.30 + 0.70 * contact)


def fog(lights: Lights, color: Tensor, depth: Tensor, image: Tensor) -> Tensor:
    haze = 1 - torch.exp(-((depth / _FOG) ** 2))
    return color + (lights.of("horizon", image) - color) * haze


def sky(lights: Lights, ray: Tensor, image: Tensor) -> Tensor:
    """Gradient, halo, clouds and stars along unit rays (3, N) -> (3, N)."""
    zenith, horizon, effects = lights.of("zenith", image), lights.of("horizon", image), lights.of("effects", image)
    up = ray[2].clamp(0, 1)
    rise = (up * 2.2).clamp(0, 1)
    color = horizon + (zenith - horizon) * (rise * (2 - rise))
    towards = dot(ray, lights.of("sun", image)).clamp(0, 1)
    halo = effects[0] * (0.6 * towards**12 + 1.6 * smooth(0.9962, 0.9975, towards))
    color = color + lights.of("sunlight", image) * halo
    plain = torch.zeros_like(image)
    flat = torch.stack([ray[0], ray[1]]) / (up + 0.12)
    cover = _lookup(_plain_texture("clouds", ray.device), flat * 0.9, plain)
    cover = smooth(0.1, 1.6, cover) * effects[1] * smooth(0.02, 0.22, up)
    white = 0.35 * horizon + 0.75 * (lights.of("ambient", image) + 0.45 * lights.of("sunlight", image))
    color = color + (white - color) * (0.75 * cover)
    twinkle = _lookup(_plain_texture("grit", ray.device), flat * 1.7, plain)
    return color + effects[2] * 0.06 * smooth(2.25, 2.5, twinkle) * smooth(0.05, 0.25, up)


def tone(color: Tensor) -> Tensor:
    """Linear light -> [0, 1], still linear: untouched up to 0.7, then a soft shoulder."""
    return torch.where(color > 0.7, 1 - 0.3 * torch.exp(-(color - 0.7) / 0.3), color)


def _lookup(table: Tensor, position: Tensor, layer: Tensor) -> Tensor:
    """Nearest texel of repeating textures (layers, TEXELS, TEXELS) at x, y of the positions (N,)."""
    column = torch.floor(position[0] * (TEXELS / TILE)).long() & (TEXELS - 1)
    row = torch.floor(position[1] * (TEXELS / TILE)).long() & (TEXELS - 1)
    return table.flatten()[(layer * TEXELS + row) * TEXELS + column]


def _detail_textures(grounds: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.cat([_plain_texture(GROUNDS[ground].texture, device) for ground in grounds])


@lru_cache(maxsize=64)
def _plain_texture(name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(texture(name))[None].to(device)  # (1, TEXELS, TEXELS)
