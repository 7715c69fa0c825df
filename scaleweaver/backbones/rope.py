"""Two-dimensional rotary positions shared by the scales of one picture.

Half of a head's angles turn with the row, half with the column; pairs are interleaved: (x0, x1), (x2, x3), ...
Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431). Modes:
0 every scale counts its own rows and columns; 1 the tables of one large grid are resized to each scale; 2 (published
models) positions of every scale are spread over `schedule.position_grid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.kernels.qkv_rope import Rope
from scaleweaver.schedule import ScaleStep, rope_position


def rope_table(
    steps: Sequence[ScaleStep],
    *,
    head_width: int,
    theta: float = 10000.0,
    mode: int = 2,
    grid: int = 128,
    device: torch.device | None = None,
) -> Rope:
    """(cos, sin), each (T, D/2) float32, of all tokens of these scales; `grid` is the side of mode 1's large grid."""
    return _rope_table(tuple(steps), head_width, theta, mode, grid, device or torch.device("cpu"))


@lru_cache(maxsize=64)
def _rope_table(
    steps: tuple[ScaleStep, ...], head_width: int, theta: float, mode: int, grid: int, device: torch.device
) -> Rope:
    # a tensor made under inference_mode could not be used for training later
    with torch.inference_mode(False):
        half = head_width // 2
        frequency = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)  # (D/4,)
        make = _resized if mode == 1 else _spread
        tables = [make(step, frequency, mode, grid) for step in steps]
        cos = torch.cat([cos for cos, _ in tables]).to(device)  # (T, D/2)
        sin = torch.cat([sin for _, sin in tables]).to(device)  # (T, D/2)
    return cos, sin


def _angles(positions: Sequence[tuple[int, int]], frequency: Tensor) -> Tensor:
    at = torch.tensor(positions, dtype=torch.float32)  # (n, 2)
    return (at[:, :, None] * frequency).flatten(1)  # (n, D/2)


def _spread(step: ScaleStep, frequency: Tensor, mode: int, grid: int) -> Rope:
    own = [(i, j) for i in range(step.h) for j in range(step.w)]
    angles = _angles(rope_position(step) if mode == 2 else own, frequency)  # (n, D/2)
    return angles.cos(), angles.sin()


def _resized(step: ScaleStep, frequency: Tensor, mode: int, grid: int) -> Rope:
    height, width = step.schedule.position_grid
    rows, cols = (grid, int(grid / height * width)) if height >= width else (int(grid / width * height), grid)
    angles = _angles([(i, j) for i in range(rows) for j in range(cols)], frequency)  # (rows * cols, D/2)
    images = torch.stack((angles.cos(), angles.sin())).unflatten(1, (rows, cols)).movedim(3, 1)  # (2, D/2, rows, cols)
    small = F.interpolate(images, size=(step.h, step.w), mode="bilinear", align_corners=True)  # (2, D/2, h, w)
    cos, sin = small.flatten(2).transpose(1, 2)  # (n, D/2)
    return cos, sin
