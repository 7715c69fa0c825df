"""One training loop on accelerate for every recipe; recipes differ in a model that returns its loss, and its data.

A run is a pure function of its config: batch i, its noise and the learning rate depend on the step alone, so a run that
is killed and started again from its last checkpoint writes the same loss curve as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
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
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.curves import Curves
from scaleweaver.train.optimizers import make_optimizer
from scaleweaver.train.processes import anyone, average_gradients, check_setup, is_sharded, mean, prepare
from scaleweaver.train.throughput import Pace, utilisation, write_summary


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
    accelerator = _accelerator(config)
    main, on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
    groups = [{**g, "params": list(g["params"])} for g in recipe.parameter_groups()]
    trained = [p for g in groups for p in g["params"]]
    model, optimizer = prepare(accelerator, recipe, make_optimizer(groups, config), trained)
    # foreach: a few kernels instead of three a weight
    ema = EMAModel(trained, decay=config.ema, use_ema_warmup=True, power=0.75, foreach=not on_cpu)
    state = State(recipe.model, optimizer, config.optimizer, ema, accelerator.scaler)
    accelerator.wait_for_everyone()
    step = state.resume(out)
    ema.to(accelerator.device)  # a checkpoint's averages come back on the CPU
    compile_networks(recipe, config.compile)
    batches, pace = Batches(recipe, config, step * config.accumulate, accelerator.device), Pace()
    written = _Written(recipe, config, accelerator, ema, trained, Curves(out, step) if main else None)
    accelerator.init_trackers("tensorboard")
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
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
            if logs:
                written.row(step, values | {"lr": config.lr_at(step - 1)} | pace.since_last())
            if validates:
                written.validation(step)
            if main and saves:
                state.save(out, step, config.keep_checkpoints)
            if stop:
                break
    written.result()
    accelerator.wait_for_everyone()
    if main and pace.steps:
        # measuring a GPU takes time, so only once all is done and saved
        measures = step >= config.steps and not on_cpu and accelerator.num_processes == 1
        write_summary(out, _speed(recipe, model, config, pace, accelerator.device if measures else None))
    accelerator.end_training()
    return out / "result"


@dataclass(frozen=True)
class _Written:
    """What a run leaves besides its checkpoints: curves, pictures, the result; the main process writes."""

    recipe: Recipe
    config: TrainConfig
    accelerator: Accelerator
    ema: EMAModel
    trained: list[nn.Parameter]
    curves: Curves | None  # of the main process

    def row(self, step: int, values: Mapping[str, float]) -> None:
        if self.curves:
            self.curves.row(step, values)
            self.accelerator.log(dict(values), step=step)

    def validation(self, step: int) -> None:
        """Metrics and the result so far, with the averaged weights."""
        # all must take part where the weights are spread over processes
        if self.accelerator.is_main_process or is_sharded(self.accelerator):
            with _averaged(self.ema, self.trained, self.recipe.model), uncompiled(self.config.compile):
                found = self.recipe.validate(Path(self.config.out) / "samples", step)
            self.result()
            self.row(step, {f"val_{name}": value for name, value in found.items()})
        self.accelerator.wait_for_everyone()

    def result(self) -> None:
        if self.accelerator.is_main_process:
            with _averaged(self.ema, self.trained, self.recipe.model), uncompiled(self.config.compile):
                self.recipe.save(Path(self.config.out) / "result")


def _accelerator(config: TrainConfig) -> Accelerator:
    """Also makes the folder of the run and notes its settings there."""
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(config.out), logging_dir=str(config.out)),
    )
    if accelerator.is_main_process:
        out = Path(config.out)
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1, default=str))
    return accelerator


def _speed(
    recipe: Recipe, model: nn.Module, config: TrainConfig, pace: Pace, device: torch.device | None
) -> dict[str, Any]:
    """Of this call; with a device also what its steps make of it."""
    summary = pace.summary(config.batch * config.accumulate)
    if device is not None:
        with uncompiled(config.compile):
            summary |= utilisation(recipe, model, config, summary["seconds_per_step"], device)
    return summary


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
