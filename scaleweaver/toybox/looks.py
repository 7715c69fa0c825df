"""Grounds and skies: their colours, lights and the small tileable textures drawn on them.

Textures come from a fixed seed and are low in contrast, so that edges belong to things and people, not to the ground.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

RGB = tuple[float, float, float]
TEXELS = 512
TILE = 8.0  # metres a texture covers before it repeats


@dataclass(frozen=True)
class Ground:
    color: RGB  # as seen on a lit surface
    texture: str
    detail: float  # strength of fine structure
    broad: float = 0.08  # strength of metre-sized patches


@dataclass(frozen=True)
class Sky:
    zenith: RGB  # as seen
    horizon: RGB  # as seen; also the fog
    sun: RGB  # linear light of the sun (or the moon)
    ambient: RGB  # linear light of the sky from above
    bounce: RGB  # linear light from below
    glow: float  # brightness of the halo around the sun
    clouds: float = 0.0
    stars: float = 0.0


GROUNDS: dict[str, Ground] = {
    "grass": Ground((0.38, 0.61, 0.27), "tufts", 0.10, 0.12),
    "sand": Ground((0.86, 0.74, 0.52), "ripples", 0.05),
    "snow": Ground((0.86, 0.90, 0.96), "soft", 0.03, 0.04),
    "dirt": Ground((0.55, 0.40, 0.28), "grit", 0.09, 0.12),
    "stone": Ground((0.62, 0.62, 0.62), "paving", 0.09),
    "wood": Ground((0.76, 0.56, 0.36), "planks", 0.10),
    "asphalt": Ground((0.42, 0.43, 0.46), "grit", 0.07),
    "carpet": Ground((0.72, 0.62, 0.76), "weave", 0.05),
}
SKIES: dict[str, Sky] = {
    "dawn": Sky(
        (0.50, 0.62, 0.86), (1.00, 0.82, 0.74), (0.92, 0.68, 0.50), (0.50, 0.48, 0.58), (0.34, 0.28, 0.28), 0.50, 0.3
    ),
    "morning": Sky(
        (0.34, 0.62, 0.93), (0.84, 0.93, 0.98), (0.98, 0.90, 0.74), (0.40, 0.46, 0.56), (0.27, 0.25, 0.22), 0.35, 0.5
    ),
    "noon": Sky(
        (0.22, 0.52, 0.92), (0.70, 0.87, 0.98), (1.00, 0.96, 0.86), (0.40, 0.46, 0.55), (0.28, 0.26, 0.24), 0.30, 0.6
    ),
    "sunset": Sky(
        (0.38, 0.36, 0.62), (1.00, 0.64, 0.36), (1.00, 0.60, 0.34), (0.46, 0.38, 0.46), (0.36, 0.26, 0.22), 0.60, 0.3
    ),
    "dusk": Sky(
        (0.20, 0.22, 0.46),
        (0.74, 0.52, 0.64),
        (0.66, 0.52, 0.60),
        (0.42, 0.40, 0.56),
        (0.25, 0.21, 0.28),
        0.30,
        0.2,
        0.25,
    ),
    "night": Sky(
        (0.03, 0.05, 0.16),
        (0.14, 0.20, 0.40),
        (0.50, 0.58, 0.80),
        (0.28, 0.34, 0.50),
        (0.15, 0.17, 0.24),
        0.25,
        0.0,
        1.0,
    ),
    "cloudy": Sky(
        (0.66, 0.71, 0.77), (0.84, 0.87, 0.90), (0.46, 0.46, 0.46), (0.72, 0.74, 0.78), (0.42, 0.41, 0.40), 0.05, 0.9
    ),
}


@cache
def texture(name: str) -> np.ndarray:
    """(TEXELS, TEXELS) float32 about 0, standard deviation about 1, tileable."""
    if name not in _TEXTURES:
        raise ValueError(f"there is no texture {name!r}; pick one of {', '.join(_TEXTURES)}")
    pattern = _TEXTURES[name]()
    return ((pattern - pattern.mean()) / pattern.std()).clip(-2.5, 2.5).astype(np.float32)


def _noise(seed: int, across: float, along: float | None = None) -> np.ndarray:
    """Smooth tileable noise with blobs about `across` (x) by `along` (y) metres."""
    along = across if along is None else along
    white = np.random.RandomState(seed).standard_normal((TEXELS, TEXELS))  # legacy generator: frozen for ever
    fy, fx = np.fft.fftfreq(TEXELS)[:, None] * TEXELS / TILE, np.fft.fftfreq(TEXELS)[None] * TEXELS / TILE
    spectrum = np.fft.fft2(white) * np.exp(-2.5 * ((fx * across) ** 2 + (fy * along) ** 2))
    spectrum[0, 0] = 0
    smooth = np.fft.ifft2(spectrum).real
    return smooth / smooth.std()


def _metres() -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(TEXELS) * (TILE / TEXELS)
    return at[None, :], at[:, None]


def _weave() -> np.ndarray:
    x, y = _metres()
    return np.sin(2 * np.pi * x / 0.25) * np.sin(2 * np.pi * y / 0.25) + 0.3 * _noise(18, 0.05)


def _cells(seed: int, wide: float, deep: float) -> np.ndarray:
    """A grid of slabs, every second row shifted by half, each with its own shade, darker at the joints."""
    x, y = _metres()
    row = np.floor(y / deep).astype(int)
    shifted = (x + (row % 2) * wide / 2) % TILE
    column = np.floor(shifted / wide).astype(int)
    shade = np.random.RandomState(seed).uniform(-1, 1, (TEXELS, TEXELS))[row, column]
    edge = np.minimum(np.minimum(shifted % wide, wide - shifted % wide), np.minimum(y % deep, deep - y % deep))
    return shade - 2.2 * np.exp(-((edge / 0.022) ** 2))


_TEXTURES: dict[str, Callable[[], np.ndarray]] = {
    "tufts": lambda: _noise(1, 0.05, 0.12) + 0.8 * _noise(2, 0.3),
    "ripples": lambda: _noise(3, 0.7, 0.14) + 0.4 * _noise(4, 0.05),
    "soft": lambda: _noise(5, 0.4) + 0.25 * _noise(6, 0.05),
    "grit": lambda: _noise(7, 0.06) + 0.7 * _noise(8, 0.35),
    "paving": lambda: _cells(9, 1.0, 0.5) + 0.25 * _noise(10, 0.08),
    "weave": _weave,
    "planks": lambda: _cells(11, 2.0, 0.25) + 0.4 * _noise(12, 0.8, 0.03),
    "broad": lambda: _noise(13, 1.3) + 0.5 * _noise(14, 0.5),
    "clouds": lambda: _noise(15, 1.2) + 0.5 * _noise(16, 0.5) + 0.2 * _noise(17, 0.22),
}
