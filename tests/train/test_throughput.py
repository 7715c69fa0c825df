"""What a run says of its speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaleweaver.train.config import TrainConfig
from scaleweaver.train.throughput import (
    FIRST,
    Pace,
    matrix_rate,
    read_summary,
    step_operations,
    utilisation,
    write_summary,
)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
        return self.layer(x).sum(), {}


class Lines:
    def __init__(self) -> None:
        self.model = Line()

    def batch(self, index: int, size: int) -> Tensor:
        return torch.ones(size, 8)


def test_operations_of_a_step():
    model = Line()
    # 3 rows times 8 x 4 weights, a product and a sum each: forward, and the gradient of the weights
    assert step_operations(model, torch.ones(3, 8)) == 2 * (2 * 3 * 8 * 4)
    assert model.layer.weight.grad is None
    assert matrix_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 0
    model.layer.weight.requires_grad_(False)  # a batch in which nothing learns: forward alone
    assert step_operations(model, torch.ones(3, 8)) == 2 * (3 * 8 * 4)


def test_utilisation_is_of_the_whole_step():
    recipe: Any = Lines()
    config = TrainConfig.from_mapping({"recipe": "x", "out": "x", "steps": 1, "batch": 3, "lr": 1, "accumulate": 5})
    values = utilisation(recipe, recipe.model, config, 0.25, torch.device("cpu"))
    assert values["operations_per_step"] == 5 * 384 and values["device"] == "cpu"
    assert values["utilisation"] == pytest.approx(5 * 384 / 0.25 / values["matrix_operations_per_second"])


def test_pace(tmp_path):
    pace = Pace()
    for _ in range(FIRST):
        pace.step(100.0, 90.0)  # compiles
    assert pace.since_last() == {"seconds": 100.0, "data_seconds": 90.0}
    pace.step(1.0, 0.0)
    pace.step(3.0, 1.0)
    assert pace.since_last() == {"seconds": 2.0, "data_seconds": 0.5}
    summary = pace.summary(pictures=8)
    assert summary["pictures_per_second"] == 4.0 and summary["waiting_for_data"] == 0.25 and summary["steps"] == 2
    assert read_summary(tmp_path) == ""
    write_summary(tmp_path, summary | {"utilisation": 0.123, "matrix_operations_per_second": 5e14, "device": "a card"})
    assert read_summary(tmp_path) == (
        "4.0 pictures/s, 25.0% of the time waiting for data, 12.3% of the 500 TFLOP/s that a card reaches in products"
    )
    short = Pace()
    short.step(2.0, 1.0)
    assert short.summary(pictures=8)["pictures_per_second"] == 4.0
