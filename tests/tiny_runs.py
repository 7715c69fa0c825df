"""Settings of short training runs, and what they wrote."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

SCHEDULE = {"grids": [[1, 1], [2, 2]], "position_grid": [2, 2], "stride": 16}  # pictures of 32 x 32
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
TINY = {"steps": 2, "batch": 2, "lr": 1e-3, "warmup": 1, "log_every": 1, "validate_every": 2, "checkpoint_every": 1}


def curve(out: Path) -> list[list[str]]:
    """The rows of metrics.csv but for the times."""
    with (out / "metrics.csv").open(newline="") as file:
        return [row for row in csv.reader(file) if row[1] not in ("seconds", "data_seconds")]


def written(folder: Path, values: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
