"""One training loop on accelerate for every recipe; recipes differ in a model that returns its loss, and its data.

A run is a pure function of its config: batch i, its noise and the learning rate depend on the step alone, so a run that
is killed and started again from its last checkpoint writes the same loss curve as one that was not.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from scaleweaver.train.batches import Batches
from scaleweaver.train.checkpoints import State
from scaleweaver.train.compiled import compile_networks, uncompiled
from scaleweaver.train.curves import Curves
from scaleweaver.train.optimizers import OPTIMIZERS, make_optimizer
from scaleweaver.train.processes import anyone, average_gradients, check_setup, is_sharded, mean, prepare
from scaleweaver.train.throughput import Pace, utilisation, write_summary


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
    on_cpu = accelerator.device.type == "cpu"
    # foreach: a few kernels instead of three a weight
    ema = EMAModel(trained, decay=config.ema, use_ema_warmup=True, power=0.75, foreach=not on_cpu)
    state = State(recipe.model, optimizer, ema, accelerator.scaler)
    accelerator.wait_for_everyone()
    step = state.resume(out)
    ema.to(accelerator.device)  # a checkpoint's averages come back on the CPU
    compile_networks(recipe, config.compile)
    batches, pace = Batches(recipe, config, step * config.accumulate, accelerator.device), Pace()
    log = Curves(out, step) if main else None
    accelerator.init_trackers("tensorboard")
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    # all must take part in a validation where the weights are spread over processes
    takes_part = main or is_sharded(accelerator)
    losses: list[torch.Tensor] = []  # of the steps that nobody has looked at
    with _progress(main) as progress, closing(batches):
        task = progress.add_task(config.recipe, total=config.steps, completed=step, loss="")
        while step < config.steps:
            started, waited = time.monotonic(), batches.waited
            metrics = _optimise(batches, config, accelerator, model, optimizer, trained, step)
            ema.step(trained)
            losses.append(metrics["loss"])
            step += 1
            last = step == config.steps
            stop = last or (config.minutes is not None and anyone(time.monotonic() >= deadline))
            logs = last or step % config.log_every == 0
            validates = last or step % config.validate_every == 0
            saves = stop or step % config.checkpoint_every == 0
            # to look at numbers is to wait for the GPU that computes them: not in every step
            if on_cpu or logs or validates or saves:
                _check(losses, step)
                losses.clear()
                values = mean({k: float(v) for k, v in metrics.items()})
                progress.update(task, completed=step, loss=f"{values['loss']:.4f}")
            pace.step(time.monotonic() - started, batches.waited - waited)
            if log and logs:
                values |= {"lr": config.lr_at(step - 1)} | pace.since_last()
                log.row(step, values)
                accelerator.log(values, step=step)
            if validates:
                if takes_part:
                    with _averaged(ema, trained, recipe.model), uncompiled(config.compile):
                        values = {f"val_{k}": v for k, v in recipe.validate(out / "samples", step).items()}
                        if main:
                            recipe.save(out / "result")
                if log:
                    log.row(step, values)
                    accelerator.log(values, step=step)
                accelerator.wait_for_everyone()
            if main and saves:
                state.save(out, step, config.keep_checkpoints)
            if stop:
                break
    if main and pace.steps:
        summary = pace.summary(config.batch * config.accumulate)
        if not on_cpu and accelerator.num_processes == 1:
            with uncompiled(config.compile):
                summary |= utilisation(recipe, model, config, summary["seconds_per_step"], accelerator.device)
        write_summary(out, summary)
    if main:
        with _averaged(ema, trained, recipe.model):
            recipe.save(out / "result")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out / "result"


def _optimise(
    batches: Batches,
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    trained: list[nn.Parameter],
    step: int,
) -> dict[str, Any]:
    """One optimiser step over `accumulate` batches; returns the metrics of the last, as they lie on the device."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step) * group.get("lr_scale", 1.0)
    for part in range(config.accumulate):
        index = step * config.accumulate + part
        # the drop-out inside networks draws from the global generator: tie it to the step as everything else
        set_seed((config.seed * 1_000_003 + index) % 2**31)
        with accelerator.accumulate(model):
            loss, metrics = model(batches.take(), config.seed * 1_000_003 + index)
            if loss.requires_grad:  # a slice in which no row sees a control moves nothing
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                average_gradients(trained)
                accelerator.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach()} | dict(metrics)


def _check(losses: list[torch.Tensor], step: int) -> None:
    """The losses of the steps before `step` must be numbers."""
    values = mean({str(step - back): float(loss) for back, loss in zip(range(len(losses), 0, -1), losses, strict=True)})
    for number, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {number}; lower lr or clip and start again: the run resumes"
            )


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
