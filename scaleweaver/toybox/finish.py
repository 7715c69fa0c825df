"""What makes a surface more than one plain colour: its finish, and stripes or dots on a thing's main body.

Points are lists of N pixels in (3, N) arrays as in `shade`; patterns are measured in metres from where the thing
stands and turn with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FINISHES: dict[str, tuple[float, float]] = {  # gloss, metal
    "matte": (0.0, 0.0),
    "glossy": (1.0, 0.0),
    "metal": (1.0, 1.0),
}
PATTERNS: dict[str, int] = {"plain": 0, "striped": 1, "dotted": 2}
MARKS = 10  # numbers of each material, see `marks_of`
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_STRIPES = 0.23  # metres from one stripe to the next
_SLOPE = 0.55  # how far stripes lean
_DOTS = 0.21  # metres from one dot to the next


def finish_of(name: str) -> tuple[float, float]:
    """Gloss and metal."""
    if name not in FINISHES:
        raise ValueError(f"there is no finish {name!r}; pick one of {', '.join(FINISHES)}")
    return FINISHES[name]


def marks_of(finish: str, pattern: str, color: np.ndarray, place: tuple[float, float, float], yaw: float) -> np.ndarray:
    """(MARKS,) of a thing's main body: metal, pattern, second colour (3, linear), where it stands (3), its turn (2)."""
    if pattern not in PATTERNS:
        raise ValueError(f"there is no pattern {pattern!r}; pick one of {', '.join(PATTERNS)}")
    second = second_color(color) ** 2.2
    return np.array([finish_of(finish)[1], PATTERNS[pattern], *second, *place, np.cos(yaw), np.sin(yaw)])


def second_color(color: np.ndarray) -> np.ndarray:
    """What stripes and dots are drawn in (3,): nearly white on dark colours, a dark shade on bright ones."""
    return 0.30 * color if color @ _LUMINANCE > 0.6 else color + (0.97 - color) * 0.92


def patterned(marks: Tensor, color: Tensor, position: Tensor, normal: Tensor) -> Tensor:
    """Colours (3, N) with the second one where a stripe or a dot is; marks (MARKS, N)."""
    x, y, z = _own_frame(position - marks[5:8], marks)
    stripe = _part((z + _SLOPE * x) / _STRIPES) < 0.45
    # dots lie on the side of a cube that the surface faces most
    across, ahead, up = (part.abs() for part in _own_frame(normal, marks))
    side, top = (across > ahead) & (across > up), (up >= ahead) & (up >= across)
    u, v = torch.where(side, y, x), torch.where(top, y, z)
    row = torch.floor(v / _DOTS)
    du, dv = _part(u / _DOTS + 0.5 * (row % 2)) - 0.5, _part(v / _DOTS) - 0.5
    dot = du * du + dv * dv < 0.29**2
    return torch.where(torch.where(marks[1] == PATTERNS["striped"], stripe, dot), marks[2:5], color)


def _own_frame(vector: Tensor, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z of world vectors (3, N) as the thing sees them."""
    cosine, sine = marks[8], marks[9]
    return cosine * vector[0] + sine * vector[1], cosine * vector[1] - sine * vector[0], vector[2]


def _part(x: Tensor) -> Tensor:
    return x - torch.floor(x)
