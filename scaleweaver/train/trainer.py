"""One training loop on accelerate for every recipe; recipes differ in a model that returns its loss, and its data.

A run is a pure function of its config: batch i, its noise and the learning rate depend on the step alone, so a run that
is killed and started again from its last checkpoint writes the same loss curve as one that was not.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from scaleweaver.train.optimizers import OPTIMIZERS, make_optimizer
from scaleweaver.train.processes import anyone, average_gradients, check_setup, is_sharded, mean, prepare

STATE_FILE = "state.pt"


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


class Recipe(Protocol):
    """What is trained, on what, and what is saved."""

    model: nn.Module
    """forward(batch, seed) -> (loss, metrics as tensors or floats); trains the parameters that require a gradient."""

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Optimiser groups; "lr_scale" multiplies the learning rate, "weight_decay" may be set."""
        ...

    def batch(self, index: int, size: int) -> Any:
        """Batch `index`, a pure function of the index; in several processes this one's share of the `size` rows."""
        ...

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Metrics on held-out data, pictures into `folder`; called with the averaged weights in place."""
        ...

    def save(self, folder: Path) -> None:
        """The result in the form that `from_pretrained` reads; called with the averaged weights in place."""
        ...


def train(recipe: Recipe, config: TrainConfig) -> Path:
    """Runs, or resumes, `config.steps` optimiser steps; returns the folder of the result."""
    check_setup(config.recipe)
    out = Path(config.out)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
    )
    main = accelerator.is_main_process
    if main:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1, default=str))
    groups = [{**g, "params": list(g["params"])} for g in recipe.parameter_groups()]
    trained = [p for g in groups for p in g["params"]]
    model, optimizer = prepare(accelerator, recipe, make_optimizer(groups, config), trained)
    ema = EMAModel(trained, decay=config.ema, use_ema_warmup=True, power=0.75)
    state = _State(recipe.model, optimizer, ema, accelerator.scaler)
    accelerator.wait_for_everyone()
    step = state.resume(out)
    ema.to(accelerator.device)  # a checkpoint's averages come back on the CPU
    log = _Log(out, step) if main else None
    accelerator.init_trackers("tensorboard")
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    # all must take part where the weights are spread over processes
    validates = main or is_sharded(accelerator)
    with _progress(main) as progress:
        task = progress.add_task(config.recipe, total=config.steps, completed=step, loss="")
        while step < config.steps:
            started = time.monotonic()
            metrics = _optimise(recipe, config, accelerator, model, optimizer, trained, step)
            ema.step(trained)
            step += 1
            metrics |= {"lr": config.lr_at(step - 1), "seconds": time.monotonic() - started}
            progress.update(task, completed=step, loss=f"{metrics['loss']:.4f}")
            last = step == config.steps
            if log and (step % config.log_every == 0 or last):
                log.row(step, metrics)
                accelerator.log(metrics, step=step)
            if step % config.validate_every == 0 or last:
                if validates:
                    with _averaged(ema, trained, recipe.model):
                        values = {f"val_{k}": v for k, v in recipe.validate(out / "samples", step).items()}
                        if main:
                            recipe.save(out / "result")
                if log:
                    log.row(step, values)
                    accelerator.log(values, step=step)
                accelerator.wait_for_everyone()
            # one look at the clock for both, so that no run ends without its checkpoint
            stop = last or (config.minutes is not None and anyone(time.monotonic() >= deadline))
            if main and (step % config.checkpoint_every == 0 or stop):
                state.save(out, step, config.keep_checkpoints)
            if stop:
                break
    if main:
        with _averaged(ema, trained, recipe.model):
            recipe.save(out / "result")
    accelerator.wait_for_everyone()
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
        index = step * config.accumulate + part
        # the drop-out inside networks draws from the global generator: tie it to the step as everything else
        set_seed((config.seed * 1_000_003 + index) % 2**31)
        with accelerator.accumulate(model):
            batch = send_to_device(recipe.batch(index, config.batch), accelerator.device)
            loss, metrics = model(batch, config.seed * 1_000_003 + index)
            if loss.requires_grad:  # a slice in which no row sees a control moves nothing
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                average_gradients(trained)
                accelerator.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    values = mean({"loss": float(loss.detach())} | {k: float(v) for k, v in metrics.items()})
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"the loss is {values['loss']} at step {step}; lower lr or clip and start again: the run resumes"
        )
    return values


@dataclass(frozen=True)
class _State:
    """All that a run goes on from: what trains, its averages and the optimiser; frozen weights come from the model."""

    model: nn.Module
    optimizer: Any
    ema: EMAModel
    scaler: Any  # of fp16

    def save(self, out: Path, step: int, keep: int) -> None:
        """Written beside, then renamed: a kill while writing leaves the previous one whole."""
        folder = out / "checkpoints" / f"{step:07d}"
        partial = folder.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        parts = {"optimizer": self.optimizer.state_dict(), "average": self.ema.state_dict(), "model": self._weights()}
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
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(parts["model"][name])
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
    return sorted(p for p in (out / "checkpoints").iterdir() if p.name.isdigit())


@contextmanager
def _averaged(ema: EMAModel, parameters: list[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """The averaged weights in place of the trained ones and all modules in eval mode, within the block."""
    training = [module for module in model.modules() if module.training]
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        yield
    finally:
        ema.restore(parameters)
        for module in training:
            module.training = True


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


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )


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
