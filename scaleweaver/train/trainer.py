"""One training loop on accelerate for every recipe: what differs between recipes is a model that returns its loss, and its data.

A run is a pure function of its config: batch i, its noise and the learning rate depend on the step alone, so a run that is killed
and started again from its last checkpoint writes the same loss curve as one that was not.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn


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
    precision: str = "no"  # "bf16" and "fp16": autocast
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    minutes: float | None = None  # wall-clock limit of this call; the run resumes where it stopped
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Known keys fill the fields, all others are the recipe's options."""
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and k != "options"}
        missing = [k for k in ("recipe", "out", "steps", "batch", "lr") if k not in known]
        if missing:
            raise ValueError(f"the training config lacks {', '.join(missing)}; add them to the yaml file or pass --set key=value")
        if known.get("lr_schedule", "cosine") not in ("cosine", "constant"):
            raise ValueError(f'lr_schedule is "{known["lr_schedule"]}"; expected "cosine" or "constant"')
        if "betas" in known:
            known["betas"] = tuple(known["betas"])
        return cls(**known, options={k: v for k, v in values.items() if k not in known})

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`: linear warm-up, then cosine or constant."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.lr_schedule == "constant":
            return self.lr * warm
        progress = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Recipe(Protocol):
    """What is trained, on what, and what is saved."""

    model: nn.Module
    """forward(batch, seed) -> (loss, metrics as tensors or floats); trains the parameters that require a gradient."""

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Optimiser groups; "lr_scale" multiplies the learning rate, "weight_decay" may be set."""
        ...

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        """Batch `index`, a pure function of the index."""
        ...

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Metrics on held-out data, pictures into `folder`; called with the averaged weights in place."""
        ...

    def save(self, folder: Path) -> None:
        """The result in the form that `from_pretrained` reads; called with the averaged weights in place."""
        ...


def train(recipe: Recipe, config: TrainConfig) -> Path:
    """Runs, or resumes, `config.steps` optimiser steps; returns the folder of the result."""
    out = Path(config.out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )
    groups = [{**g, "params": list(g["params"])} for g in recipe.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    model, optimizer = accelerator.prepare(recipe.model, optimizer)
    trained = [p for g in groups for p in g["params"]]
    ema = EMAModel(trained, decay=config.ema, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = _resume(accelerator, out)
    log = _Log(out, step)
    accelerator.init_trackers("tensorboard")
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    with _progress(accelerator) as progress:
        task = progress.add_task(config.recipe, total=config.steps, completed=step, loss="")
        while step < config.steps and time.monotonic() < deadline:
            started = time.monotonic()
            metrics = _optimise(recipe, config, accelerator, model, optimizer, trained, step)
            ema.step(trained)
            step += 1
            metrics |= {"lr": config.lr_at(step - 1), "seconds": time.monotonic() - started}
            progress.update(task, completed=step, loss=f"{metrics['loss']:.4f}")
            if step % config.log_every == 0 or step == config.steps:
                log.row(step, metrics)
                accelerator.log(metrics, step=step)
            if step % config.validate_every == 0 or step == config.steps:
                with _averaged(ema, trained):
                    values = {f"val_{k}": v for k, v in recipe.validate(out / "samples", step).items()}
                    recipe.save(out / "result")
                log.row(step, values)
                accelerator.log(values, step=step)
            if step % config.checkpoint_every == 0 or step == config.steps or time.monotonic() >= deadline:
                _checkpoint(accelerator, out, step, config.keep_checkpoints)
    with _averaged(ema, trained):
        recipe.save(out / "result")
    accelerator.end_training()
    return out / "result"


def _optimise(
    recipe: Recipe,
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    trained: list[nn.Parameter],
    step: int,
) -> dict[str, float]:
    """One optimiser step over `accumulate` batches; returns the metrics of the last."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step) * group.get("lr_scale", 1.0)
    for part in range(config.accumulate):
        index = (step * config.accumulate + part) * accelerator.num_processes + accelerator.process_index
        # the drop-out inside networks draws from the global generator: tie it to the step as everything else
        set_seed((config.seed * 1_000_003 + index) % 2**31)
        with accelerator.accumulate(model):
            loss, metrics = model(recipe.batch(index, config.batch), config.seed * 1_000_003 + index)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}; lower lr or clip, then start again: the run resumes")
    return {"loss": value} | {k: float(v) for k, v in metrics.items()}


def _checkpoint(accelerator: Accelerator, out: Path, step: int, keep: int) -> None:
    """Written beside, then renamed: a kill while writing leaves the previous one whole."""
    folder = out / "checkpoints" / f"{step:07d}"
    partial = folder.with_suffix(".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)


def _checkpoints(out: Path) -> list[Path]:
    return sorted(p for p in (out / "checkpoints").iterdir() if p.name.isdigit())


def _resume(accelerator: Accelerator, out: Path) -> int:
    found = _checkpoints(out)
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name)


class _averaged:
    """The averaged weights in place of the trained ones, within the block."""

    def __init__(self, ema: EMAModel, parameters: list[nn.Parameter]):
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)

    def __exit__(self, *_: object) -> None:
        self.ema.restore(self.parameters)


class _Log:
    """metrics.csv in long form (step, name, value); rows past the resumed step are cut off."""

    def __init__(self, out: Path, step: int):
        self.path = out / "metrics.csv"
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="") as f:
                rows = [r for r in list(csv.reader(f))[1:] if len(r) == 3 and int(r[0]) <= step]
        with self.path.open("w", newline="") as f:
            csv.writer(f).writerows([["step", "name", "value"], *rows])

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as f:
            csv.writer(f).writerows([step, name, f"{value:.6g}"] for name, value in metrics.items())


def _progress(accelerator: Accelerator) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not accelerator.is_main_process,
    )


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain data, for the result's metadata."""
    return asdict(config)
