"""Weather: how it changes the light, and what falls or hangs between the camera and the scene.

It is drawn over the finished light of a picture, so depth, ids and key points know nothing of it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scaleweaver.toybox.scene import Scene


@dataclass(frozen=True)
class Weather:
    """Factors of the scene's own sky; `Weather()` leaves everything as it is."""

    sun: float = 1.0
    ambient: float = 1.0
    grey: float = 0.0  # how much of the sky's hue is lost
    sky: float = 1.0  # brightness of the sky
    ground: float = 1.0  # brightness of the ground: wet ground is dark
    glow: float = 1.0  # of the sun's halo, the clouds' contours and the stars
    sight: float = 0.0  # distances to the subjects after which haze has taken most of the light; 0 for no haze
    haze: float = 0.0  # the most it takes
    falls: str = ""  # "drops" or "flakes"


WEATHERS: dict[str, Weather] = {
    "clear": Weather(),
    "rain": Weather(0.55, 1.05, 0.6, 0.62, 0.72, 0.25, 4.0, 0.75, "drops"),
    "snowfall": Weather(0.60, 1.10, 0.7, 0.66, 1.0, 0.15, 4.5, 0.70, "flakes"),
    "fog": Weather(0.55, 1.10, 0.75, 0.95, 0.95, 0.1, 1.75, 0.97),
}
_RAIN = ((24, 3, 0.0046, 0.32), (38, 4, 0.0034, 0.24))  # columns, rows, half width of a drop, its length in rows
_SLANT = 0.16
_SNOW = ((7, 0.0150), (11, 0.0105), (16, 0.0072))  # cells a side, largest radius of a flake
_SHOWN = 0.55  # share of cells in which something falls


def muted(color: np.ndarray, weather: Weather) -> np.ndarray:
    """A sky's colour (3,) in linear light, under this weather."""
    grey = np.full(3, color @ np.array([0.2126, 0.7152, 0.0722]))
    return (color + (grey - color) * weather.grey) * weather.sky


def over(color: Tensor, depth: Tensor, horizon: Tensor, scene: Scene, ambient: float) -> Tensor:
    """Light (3, n, n) of a picture, with its depth (n, n), as it arrives through the weather."""
    weather = WEATHERS[scene.weather]
    if weather.sight:
        thickness = 1 - torch.exp(-((depth / (weather.sight * scene.camera.distance)) ** 2))
        veil = horizon[:, None, None] + 0.10 * ambient
        color = color + (veil - color) * (weather.haze * thickness)
    if not weather.falls:
        return color
    bright = 0.12 + 1.15 * ambient if weather.falls == "drops" else 0.35 + 1.3 * ambient
    strength = (_drops if weather.falls == "drops" else _flakes)(len(depth), _numbers(scene), depth.device)
    return color + (bright - color) * strength


def _numbers(scene: Scene) -> np.random.RandomState:
    """Random numbers that depend on the scene alone; the legacy generator is frozen for ever."""
    return np.random.RandomState(zlib.crc32(repr((scene.sun_azimuth, scene.sun_elevation)).encode()))


def _drops(size: int, random: np.random.RandomState, device: torch.device) -> Tensor:
    """How much of each pixel falling drops cover, (size, size)."""
    y, x = _pixels(size, device)
    covered = torch.zeros(size, size, device=device)
    for columns, rows, half_width, length in _RAIN:
        across = (x + _SLANT * y) * columns
        column = across.long()
        start, place, shown = (_table(random, (columns + 8, rows + 2), device) for _ in range(3))
        # each column starts at a height of its own
        down = y * rows + start[column, 0]
        row = down.long()
        middle = 0.2 + 0.6 * place[column, row]
        inside = (across - column - middle).abs() < half_width * columns
        inside &= (down - row < length) & (shown[column, row] < _SHOWN)
        covered = torch.where(inside, 0.46, covered)
    return covered


def _flakes(size: int, random: np.random.RandomState, device: torch.device) -> Tensor:
    """How much of each pixel falling flakes cover, (size, size)."""
    y, x = _pixels(size, device)
    covered = torch.zeros(size, size, device=device)
    for cells, radius in _SNOW:
        column, row = (x * cells).long(), (y * cells).long()
        dx, dy, large, shown = (_table(random, (cells, cells), device)[row, column] for _ in range(4))
        own = radius * (0.6 + 0.4 * large) * cells  # radius in cells; the flake keeps inside of its cell
        margin = 0.5 - own
        away = (x * cells - column - 0.5 - (2 * dx - 1) * margin) ** 2
        away = away + (y * cells - row - 0.5 - (2 * dy - 1) * margin) ** 2
        soft = ((own - away.sqrt()) / (0.35 * own)).clamp(0, 1) * (shown < _SHOWN)
        covered = torch.maximum(covered, 0.9 * soft)
    return covered


def _pixels(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x of pixel centres from 0 to 1, (size, size) each."""
    at = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(at, at, indexing="ij")
    return y, x


def _table(random: np.random.RandomState, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.from_numpy(random.random_sample(shape).astype(np.float32)).to(device)
