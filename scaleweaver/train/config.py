"""Settings of a training: those of the loop, and the recipe's own as they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from scaleweaver.train.optimizers import OPTIMIZERS


class Options(dict[str, Any]):
    """A recipe's own settings; one that is needed and missing is named."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"the training config lacks {name}; add it to the yaml file or pass --set {name}=value")

    def among(self, known: frozenset[str]) -> Options:
        """These options, if the recipe knows them all."""
        unknown = sorted(set(self) - known)
        if unknown:
            own = sorted({entry.name for entry in fields(TrainConfig)} - {"options"})
            raise ValueError(
                f"the training config sets {', '.join(unknown)}, which nothing reads; this recipe knows "
                f"{', '.join(sorted(known))}, the training loop {', '.join(own)}"
            )
        return self


@dataclass(frozen=True)
class TrainConfig:
    """What the loop itself needs; everything of the recipe is in ``options``."""

    recipe: str
    out: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    lr_schedule: str = "cosine"  # or "constant"
    final_lr: float = 0.05  # fraction of lr that the cosine ends at
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.97)
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.999
    optimizer: str = "adamw"  # "adamw_fused": one kernel a step; "adamw_8bit": a quarter of the state, bitsandbytes;
    # "muon": Muon on hidden matrices (optimizers.py)
    precision: str = "no"  # "bf16" and "fp16": autocast
    compile: str = ""  # a backend of torch.compile for the networks: "inductor"
    workers: int = 0  # processes that make batches ahead; 0: each is made when its step comes
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    minutes: float | None = None  # wall-clock limit of this call; the run resumes where it stopped
    options: Options = field(default_factory=Options)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Known keys fill the fields, all others are the recipe's options."""
        values = _with_numbers(values)
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and k != "options"}
        missing = [k for k in ("recipe", "out", "steps", "batch", "lr") if k not in known]
        if missing:
            raise ValueError(
                f"the training config lacks {', '.join(missing)}; add them to the yaml file or pass --set key=value"
            )
        sets = {"lr_schedule": ("cosine", "constant"), "precision": ("no", "bf16", "fp16"), "optimizer": OPTIMIZERS}
        for name, choices in sets.items():
            if known.get(name, choices[0]) not in choices:
                raise ValueError(f"{name} is {known[name]!r}; expected one of {', '.join(choices)}")
        for entry in fields(cls):
            optional = entry.name in known and known[entry.name] is None and entry.default is None
            if entry.name in known and entry.type in ("int", "float", "float | None") and not optional:
                known[entry.name] = _number(entry.name, known[entry.name], whole=entry.type == "int")
        if "betas" in known:
            known["betas"] = tuple(float(beta) for beta in known["betas"])
        return cls(**known, options=Options({k: v for k, v in values.items() if k not in known}))

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`: linear warm-up, then cosine or constant."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "constant":
            return self.lr * warm
        progress = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def _with_numbers(value: Any) -> Any:
    """Settings with every text like 1e-1 as a number: yaml takes those for text that lack the point or the sign."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_numbers(entry) for entry in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def _number(name: str, value: Any, *, whole: bool) -> int | float:
    """A setting of the loop as a number of its kind and range."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; expected a number") from None
    counted = name in (
        "steps",
        "batch",
        "accumulate",
        "log_every",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
    )
    if (whole and number != int(number)) or number < int(counted):
        raise ValueError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number from {int(counted)} on")
    return int(number) if whole else number
