"""A recipe of seconds with drop-out and noise of its own, to try the training loop on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_runs import curve
from torch import Tensor, nn

from scaleweaver.train.config import TrainConfig


class Kill(Exception):
    """Stands for what ends a run in between."""


class Noisy:
    """A recipe of a small network with drop-out and noise of its own, which ends at batch `kill`."""

    def __init__(self, kill: int | None = None):
        torch.manual_seed(0)
        self.model: nn.Module = NoisyLoss()
        self.kill = kill
        self.validated: list[tuple[bool, bool]] = []

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        first, second = self.model.first, self.model.second
        return [{"params": first.parameters(), "lr_scale": 0.5}, {"params": second.parameters(), "weight_decay": 0.1}]

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        if index == self.kill:
            raise Kill
        return {"x": torch.from_numpy(np.random.default_rng(index).normal(size=(size, 4))).float()}

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        self.validated.append((self.model.first.training, self.model.frozen.training))
        return {"weight": float(self.model.second.weight.detach().sum())}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.clone() for k, v in self.model.state_dict().items()}, folder / "model.pt")


class NoisyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 8), nn.Linear(8, 1), nn.Dropout(0.3)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(batch["x"].shape, generator=torch.Generator().manual_seed(seed))
        drawn = self.second(self.drop(torch.tanh(self.first(batch["x"] + 0.1 * noise))))
        loss = (drawn - batch["x"].sum(1, keepdim=True)).square().mean()
        return loss, {"seed": float(seed % 1000)}


def config(out: Path, **more: Any) -> TrainConfig:
    values = {"recipe": "noisy", "out": str(out), "steps": 6, "batch": 3, "lr": 0.05, "warmup": 2, "accumulate": 2}
    return TrainConfig.from_mapping(values | {"log_every": 1, "validate_every": 3, "checkpoint_every": 3} | more)


def weights(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "result" / "model.pt")


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name
