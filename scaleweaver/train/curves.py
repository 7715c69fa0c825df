"""What a run writes down while it trains."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

CURVES = "metrics.csv"


class Curves:
    """metrics.csv in long form (step, name, value); rows past the resumed step are cut off."""

    def __init__(self, out: Path, step: int):
        self.path = out / CURVES
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="") as f:
                rows = [r for r in list(csv.reader(f))[1:] if len(r) == 3 and int(r[0]) <= step]
        with self.path.open("w", newline="") as f:
            csv.writer(f).writerows([["step", "name", "value"], *rows])

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as f:
            csv.writer(f).writerows([step, name, f"{value:.6g}"] for name, value in metrics.items())
