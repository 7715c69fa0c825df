"""How fast a run is: pictures a second, the share of time spent waiting for data, and what a GPU makes of its peak."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from scaleweaver.train.config import TrainConfig
    from scaleweaver.train.trainer import Recipe

FIRST = 3  # steps of a call in which caches fill and networks are compiled: not counted where there are others
FILE = "throughput.json"


class Pace:
    """The times of the steps of one call."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # seconds of a step, those of them spent waiting for its batch
        self.reported = 0

    def step(self, seconds: float, waited: float) -> None:
        self.steps.append((seconds, waited))

    def since_last(self) -> dict[str, float]:
        """Means over the steps since the last call: on a GPU the time of a single step says little."""
        new, self.reported = self.steps[self.reported :], len(self.steps)
        seconds, waited = (sum(column) / len(new) for column in zip(*new, strict=True))
        return {"seconds": seconds, "data_seconds": waited}

    def summary(self, pictures: int) -> dict[str, Any]:
        """Of the whole call, whose steps have so many pictures."""
        counted = self.steps[FIRST:] or self.steps
        seconds, waited = (sum(column) for column in zip(*counted, strict=True))
        return {
            "steps": len(counted),
            "seconds_per_step": seconds / len(counted),
            "pictures_per_second": pictures * len(counted) / seconds,
            "waiting_for_data": waited / seconds,
        }


def utilisation(
    recipe: Recipe, model: nn.Module, config: TrainConfig, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Operations of a step of so many seconds, and their rate as a share of what matrix products reach here."""
    batch = send_to_device(recipe.batch(0, config.batch), device)
    operations = config.accumulate * step_operations(model, batch)
    rate = matrix_rate(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "operations_per_step": operations,
        "matrix_operations_per_second": rate,
        "utilisation": operations / seconds / rate,
    }


def step_operations(model: nn.Module, batch: Any) -> int:
    """Floating-point operations of one forward and backward pass of `model(batch, seed)`, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        loss = model(batch, 0)[0]
        if loss.requires_grad:
            loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations a second in products of large square matrices of this number format."""
    side = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    done, wait = 0, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b
    wait()
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        for _ in range(10):
            a @ b
        wait()
        done += 10
    return done * 2 * side**3 / (time.monotonic() - started)


def write_summary(out: Path, values: Mapping[str, Any]) -> None:
    (out / FILE).write_text(json.dumps(values, indent=1))


def read_summary(out: Path) -> str:
    """One line on the last call of the run in `out`; nothing if it made no step."""
    if not (out / FILE).is_file():
        return ""
    values = json.loads((out / FILE).read_text())
    text = (
        f"{values['pictures_per_second']:.1f} pictures/s, {values['waiting_for_data']:.1%} of the time waiting for data"
    )
    if "utilisation" in values:
        rate = values["matrix_operations_per_second"] / 1e12
        text += f", {values['utilisation']:.1%} of the {rate:.0f} TFLOP/s that {values['device']} reaches in products"
    return text
