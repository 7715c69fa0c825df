"""Which (h, w) grids a picture is built from, coarse to fine, and where each token sits for RoPE.

The tables are the aspect-ratio templates of Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution
Image Synthesis (arXiv 2412.04431). Every pixel budget of a ratio is a prefix of that ratio's 1M schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

Grid = tuple[int, int]

# ratio -> grids of the 1M schedule; the ratio is height / width, wide pictures use the transposed grids.
_TALL: dict[str, str] = {
    "1.0": "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "1.25": "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1.333": "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1.5": "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1.75": "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "2.0": "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "2.5": "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "3.0": "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}
# inverse ratios are truncated to three decimals, not rounded: the names of the published templates.
_WIDE: dict[str, str] = {
    "0.8": "1.25", "0.75": "1.333", "0.666": "1.5", "0.571": "1.75", "0.5": "2.0", "0.4": "2.5", "0.333": "3.0",
}  # fmt: skip

RATIOS: tuple[str, ...] = (
    "1.0", "1.25", "0.8", "1.333", "0.75", "1.5", "0.666", "1.75", "0.571", "2.0", "0.5", "2.5", "0.4", "3.0", "0.333",
)  # fmt: skip
BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # pixel budget -> number of scales


@dataclass(frozen=True)
class ScaleStep:
    """One scale of a schedule: an (h, w) grid of n tokens whose first token has sequence index `start`."""

    index: int
    h: int
    w: int
    n: int
    start: int
    is_last: bool
    schedule: ScaleSchedule = field(repr=False)

    @property
    def stop(self) -> int:
        """Sequence index after the last token of this scale."""
        return self.start + self.n


@dataclass(frozen=True)
class ScaleSchedule:
    """Transformer grids from coarse to fine.

    `position_grid` is the grid RoPE positions are spread over: the last grid of the ratio's 1M schedule for Infinity.
    `stride` is the number of pixels per transformer token. `full_grids` stays the complete list after `truncate`, so a
    shortened run still knows the final grid; leave it empty otherwise.
    """

    grids: tuple[Grid, ...]
    position_grid: Grid
    stride: int = 16
    full_grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        if not self.grids or any(min(grid) < 1 for grid in self.grids) or min(*self.position_grid, self.stride) < 1:
            raise ValueError(
                f"grids {self.grids}, position_grid {self.position_grid}, stride {self.stride}: expected at least one "
                "grid and sizes of 1 or more"
            )
        if not self.full_grids:
            object.__setattr__(self, "full_grids", self.grids)
        if self.full_grids[: len(self.grids)] != self.grids:
            raise ValueError(f"grids {self.grids} are no prefix of full_grids {self.full_grids}; use truncate()")

    @cached_property
    def steps(self) -> tuple[ScaleStep, ...]:
        steps: list[ScaleStep] = []
        start = 0
        for index, (h, w) in enumerate(self.grids):
            steps.append(ScaleStep(index, h, w, h * w, start, index == len(self.full_grids) - 1, self))
            start += h * w
        return tuple(steps)

    def __iter__(self) -> Iterator[ScaleStep]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def length(self) -> int:
        """Number of tokens of all scales together."""
        return self.steps[-1].stop

    @property
    def final_grid(self) -> Grid:
        """Last grid of the full schedule, the one the latent lives on."""
        return self.full_grids[-1]

    @property
    def height(self) -> int:
        """Picture height in pixels."""
        return self.final_grid[0] * self.stride

    @property
    def width(self) -> int:
        """Picture width in pixels."""
        return self.final_grid[1] * self.stride

    def truncate(self, scales: int) -> ScaleSchedule:
        """The first scales only; final grid and `is_last` stay those of the full schedule."""
        if not 1 <= scales <= len(self.grids):
            raise ValueError(f"cannot keep {scales} scales of {len(self.grids)}; pass 1 to {len(self.grids)}")
        return ScaleSchedule(self.grids[:scales], self.position_grid, self.stride, self.full_grids)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data: dict[str, Any] = {
            "grids": [list(grid) for grid in self.grids],
            "position_grid": list(self.position_grid),
            "stride": self.stride,
        }
        if self.full_grids != self.grids:
            data["full_grids"] = [list(grid) for grid in self.full_grids]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScaleSchedule:
        """Inverse of `to_dict`."""
        return cls(
            grids=_as_grids(data["grids"]),
            position_grid=_as_grids([data["position_grid"]])[0],
            stride=int(data.get("stride", 16)),
            full_grids=_as_grids(data.get("full_grids", ())),
        )


def _as_grids(grids: Sequence[Sequence[int]]) -> tuple[Grid, ...]:
    return tuple((int(h), int(w)) for h, w in grids)


def infinity_schedule(ratio: str = "1.0", budget: str = "0.06M") -> ScaleSchedule:
    """The template of an aspect ratio (height / width) at a pixel budget."""
    if ratio not in RATIOS:
        raise ValueError(f"ratio {ratio!r} is not a template; pass one of {', '.join(RATIOS)}")
    if budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown; pass one of {', '.join(BUDGETS)}")
    table = _TALL[_WIDE.get(ratio, ratio)]
    grids = _as_grids([[int(side) for side in grid.split("x")] for grid in table.split()])
    if ratio in _WIDE:
        grids = tuple((w, h) for h, w in grids)
    return ScaleSchedule(grids[: BUDGETS[budget]], position_grid=grids[-1])


def nearest_schedule(height: int, width: int, budget: str | None = None) -> ScaleSchedule:
    """The template whose height / width is closest, at the budget whose pixel count is closest in ratio."""
    if min(height, width) < 1:
        raise ValueError(f"picture size {height}x{width} is empty; pass a height and a width of 1 or more")
    ratio = min(RATIOS, key=lambda name: abs(float(name) - height / width))
    if budget is not None:
        return infinity_schedule(ratio, budget)
    choices = [infinity_schedule(ratio, name) for name in BUDGETS]
    return min(choices, key=lambda choice: abs(math.log(choice.height * choice.width / (height * width))))


def rope_position(step: ScaleStep) -> tuple[Grid, ...]:
    """Integer (row, column) of each of the step's n tokens on the position grid, row major.

    Exact rational arithmetic with halves rounded to even: row i of h becomes round(i * H / h).
    """
    height, width = step.schedule.position_grid
    rows = [round(Fraction(i * height, step.h)) for i in range(step.h)]
    cols = [round(Fraction(j * width, step.w)) for j in range(step.w)]
    return tuple((row, col) for row in rows for col in cols)
