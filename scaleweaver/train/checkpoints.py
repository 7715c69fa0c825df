"""Checkpoints of a run: all that it goes on from, bit by bit."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class State:
    """All that a run goes on from: what trains, its averages and the optimiser; frozen weights come from the model."""

    model: nn.Module
    optimizer: Any
    optimizer_name: str  # as the settings name it
    ema: EMAModel
    scaler: Any  # of fp16

    def save(self, out: Path, step: int, keep: int) -> None:
        """Written beside, then renamed: a kill while writing leaves the previous one whole."""
        folder = out / "checkpoints" / f"{step:07d}"
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        parts = {"optimizer": self.optimizer.state_dict(), "average": self.ema.state_dict(), "model": self._weights()}
        parts["optimizer_name"] = self.optimizer_name
        torch.save(parts | {"scaler": self.scaler.state_dict() if self.scaler else None}, partial / STATE_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)

    def resume(self, out: Path) -> int:
        """Reads the newest checkpoint; returns its step, 0 without one."""
        found = _checkpoints(out)
        if not found:
            return 0
        file = found[-1] / STATE_FILE
        if not file.is_file():
            raise ValueError(f"{found[-1]} holds no {STATE_FILE}, another version wrote it; remove it to start again")
        parts = torch.load(file, map_location="cpu", weights_only=True)
        own = self._weights()
        here, there = ({(name, x.shape) for name, x in each.items()} for each in (own, parts["model"]))
        if changed := sorted({name for name, _ in here ^ there}):
            raise ValueError(
                f"{file} holds other weights than this run trains ({changed[0]} and {len(changed) - 1} more); go on "
                "with the settings it began with, or set out to another folder"
            )
        before = parts.get("optimizer_name", self.optimizer_name)
        if parts["optimizer"] is not None and before != self.optimizer_name:
            raise ValueError(
                f"{file} was written with {before}, this run uses {self.optimizer_name}; set optimizer back, or begin "
                "another out with start_from"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(parts["model"][name])
        if parts["optimizer"] is None:
            warnings.warn(f"{file} was packed without the optimizer's state, which starts afresh", stacklevel=2)
        else:
            self.optimizer.load_state_dict(parts["optimizer"])
        self.ema.load_state_dict(parts["average"])
        if self.scaler and parts["scaler"]:
            self.scaler.load_state_dict(parts["scaler"])
        return int(found[-1].name)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What changes in training: weights with a gradient, and buffers."""
        learned = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return learned | {name: buffer for name, buffer in self.model.named_buffers() if buffer is not None}


def _checkpoints(out: Path) -> list[Path]:
    return sorted(p for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def newest_checkpoint(out: Path) -> Path | None:
    """The folder of the newest checkpoint of the run in `out`; its name is the number of steps."""
    return next(reversed(_checkpoints(out)), None)
