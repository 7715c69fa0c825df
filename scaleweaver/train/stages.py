"""A recipe of several trainings, one after the other, each on what earlier ones gave: recipes/toybox.yaml.

Its file names an `out` folder; `stages`, each an ordinary training config, from a `file` or in place, with what differs
here; an `assembly` of their results; and `presets`, small sets of changes for a kind of machine. Stage NAME has the
folder out/NAME and leaves its result in out/NAME/result, so a path to there says what is taken from an earlier stage.
With another `out` all paths below the file's own move along.
"""

from __future__ import annotations

import gc
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from scaleweaver.train import changed, make_recipe, read_settings, recipe_class
from scaleweaver.train.assembly import assemble, copy_halved, sizes
from scaleweaver.train.checkpoints import newest_checkpoint
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import check_source, stores_of
from scaleweaver.train.rendering import Renderers
from scaleweaver.train.throughput import read_summary
from scaleweaver.train.trainer import train

ASSEMBLY = "assembly"
FINISHED = "finished.json"
RECORD = "recipe.json"  # what the folder of a run belongs to
AGAIN = 5.0  # seconds after which the alarm rings again, should a destructor have swallowed it


class OutOfTime(BaseException):
    """The minutes of a call are over; what is done stays. No Exception: it may come up in code that catches those."""


@dataclass(frozen=True)
class Stage:
    """One training, or the assembly, which has no config."""

    name: str
    out: Path
    config: TrainConfig | None
    needs: tuple[str, ...]  # the stages whose results it takes

    @property
    def finished(self) -> bool:
        return (self.out / FINISHED).is_file()

    @property
    def steps_done(self) -> int:
        if self.finished:
            return int(json.loads((self.out / FINISHED).read_text())["steps"])
        found = newest_checkpoint(self.out)
        return int(found.name) if found else 0

    def finish(self) -> None:
        """Marks it as finished, with the steps that it has made."""
        (self.out / FINISHED).write_text(json.dumps({"steps": self.steps_done}))

    def stores(self) -> list[Mapping[str, Any]]:
        """The render stores that it reads and can render."""
        options = self.config.options if self.config else {}
        sources = [source for key in ("data", "val_data") if key in options for source in stores_of(options[key])]
        return [source for source in sources if isinstance(source, Mapping) and "path" in source]


@dataclass(frozen=True)
class Plan:
    """A recipe with its preset applied."""

    out: Path
    preset: str
    stages: tuple[Stage, ...]
    assembly: Mapping[str, Any]
    weights_mb: float  # what the assembly may weigh
    renderers: int  # processes that fill the stores of later stages meanwhile

    def find(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"{name!r} is no stage of this recipe; it has {', '.join(s.name for s in self.stages)}")


def read_plan(
    recipe: str | Path,
    preset: str | None = None,
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """The stages of a recipe's file under one of its presets; `overrides` as in `read_config`: "STAGE.steps"."""
    values = read_settings(recipe)
    known = {"out", "stages", "assembly", "presets", "weights_mb"}
    if unread := sorted(set(values) - known):
        takes = ", ".join(sorted(known))
        raise ValueError(f"{recipe} sets {', '.join(unread)}, which nothing reads; a recipe has {takes}")
    if not values.get("out") or not values.get("stages"):
        raise ValueError(
            f"{recipe} lacks out or stages; out is the folder of the run, stages are its trainings by name"
        )
    presets = values.get("presets", {})
    if preset not in presets and (presets or preset is not None):
        raise ValueError(f"preset is {preset!r}; {recipe} has {', '.join(presets) or 'none'}, pass one with --preset")
    chosen = presets.get(preset) or {}
    if unread := sorted(set(chosen) - {"renderers", "every", "stages"}):
        raise ValueError(
            f"preset {preset} of {recipe} sets {', '.join(unread)}, which nothing reads; a preset has renderers, every "
            "(settings of all stages) and stages (those of one, by its name)"
        )
    of_stages = chosen.get("stages", {})
    for name in (*of_stages, *(key.partition(".")[0] for key in overrides or {})):
        if name not in values["stages"]:
            raise ValueError(f"{name} is no stage of {recipe}; it has {', '.join(values['stages'])}")
    base, here = str(values["out"]), str(out or values["out"])
    settings = {}
    for name, own in values["stages"].items():
        own = dict(own or {})
        file = own.pop("file", None)
        merged = read_settings(Path(recipe).parent / file) if file else {}
        for layer in (own, chosen.get("every", {}), of_stages.get(name, {}), {"out": f"{base}/{name}"}):
            merged = _merged(merged, layer)
        settings[name] = merged
    settings = changed(_moved(settings, base, here), overrides or {})
    stages = tuple(
        Stage(name, Path(each["out"]), _config(name, each), _needs(each, settings, here))
        for name, each in settings.items()
    )
    for stage in stages:
        for store in stage.stores():
            check_source(store)
    assembly = _moved(values.get("assembly", {}), base, here)
    if assembly:
        stages += (Stage(ASSEMBLY, Path(here) / ASSEMBLY, None, _needs(assembly, settings, here)),)
    return Plan(
        Path(here), preset or "", stages, assembly, values.get("weights_mb", math.inf), chosen.get("renderers", 0)
    )


def _config(stage: str, settings: Mapping[str, Any]) -> TrainConfig:
    """Settings of a stage, if its recipe reads all of them: better told now than after the stages before."""
    try:
        config = TrainConfig.from_mapping(settings)
        config.options.among(recipe_class(config.recipe).option_names)
    except ValueError as error:
        raise ValueError(f"stage {stage}: {error}") from None
    return config


def run_stages(
    plan: Plan,
    *,
    minutes: float | None = None,
    only: str | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs what is not finished, or one stage `only`, and says how it went; False if the minutes ended it before.

    The same call again goes on where this one stopped, or was killed.
    """
    stages = [plan.find(only)] if only else plan.stages
    take_over(plan)
    clock = Clock(minutes)
    renderers = None
    try:
        with clock.interrupts():
            renderers = Renderers((s for stage in stages if not stage.finished for s in stage.stores()), plan.renderers)
        for stage in stages:
            if stage.finished:
                say(f"{stage.name}: finished before")
                continue
            if missing := [name for name in stage.needs if not plan.find(name).finished]:
                raise ValueError(f"{stage.name} takes the result of {', '.join(missing)}, which is not finished")
            if stage.config is None:
                with clock.interrupts():
                    say(_assemble(plan, stage))
            elif not _train(stage, stage.config, clock, renderers, say):
                return False
    except OutOfTime:
        say("the time is over; the same command goes on")
        return False
    finally:
        if renderers is not None:
            renderers.close()
    return True


def take_over(plan: Plan) -> None:
    """Notes the preset in the folder of the run, or compares it with the one that the run began with."""
    record = plan.out / RECORD
    if record.is_file():
        begun = json.loads(record.read_text())["preset"]
        if begun != plan.preset:
            raise ValueError(
                f"{plan.out} was begun with preset {begun!r}; go on with it, or pass another folder as --out and begin "
                "from the weights of this one (start_from)"
            )
        return
    plan.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"preset": plan.preset}))


class Clock:
    """The wall-clock time that a call has."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float | None:
        """Minutes, None without a limit."""
        return None if self.end == math.inf else max(0.0, self.end - time.monotonic()) / 60

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within the block the end raises OutOfTime: preparing a stage may take long, and can be killed anywhere."""
        left = self.left
        if left == 0:
            raise OutOfTime
        receives = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
        if left is None or not receives:  # Windows has no such signal, other threads get none
            yield
            return

        rung = False

        def ring(*_: Any) -> None:
            nonlocal rung
            rung = True
            raise OutOfTime

        learns, number_format = torch.is_grad_enabled(), torch.get_default_dtype()
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 60 * left, AGAIN)
        try:
            yield
            if rung:  # somebody has swallowed it, so what was prepared may lack something
                raise OutOfTime
        except Exception as error:
            if rung:  # somebody has taken it for an error of his own: safetensors does
                raise OutOfTime from error
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            # the end may have come just before somebody would have put these back
            torch.set_grad_enabled(learns)
            torch.set_default_dtype(number_format)


def _train(stage: Stage, config: TrainConfig, clock: Clock, renderers: Renderers, say: Callable[[str], None]) -> bool:
    """Trains a stage as long as there is time; whether it is finished."""
    AcceleratorState._reset_state()  # it keeps the number format of the stage before
    with clock.interrupts():
        renderers.wait(stage.stores())
        recipe = make_recipe(config)
    train(recipe, replace(config, minutes=clock.left))
    del recipe
    _forget(config)
    finished = stage.steps_done >= config.steps
    if finished:
        stage.finish()
    state = "finished" if finished else f"stopped after {stage.steps_done} of {config.steps} steps"
    say(f"{stage.name}: {state}; {read_summary(stage.out)}")
    return finished


def _forget(config: TrainConfig) -> None:
    """Gives back what the stage before had on the device."""
    gc.collect()
    if config.compile:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _assemble(plan: Plan, stage: Stage) -> str:
    """Puts the results together as they ship."""
    result = stage.out / "result"
    for name, part in plan.assembly.items():
        if isinstance(part, Mapping):
            defaults = {key: value for key, value in part.items() if key != "model"}
            assemble(result / name, part["model"], defaults=defaults)
        else:
            copy_halved(result / name, part)
    total = sum(sizes(result).values()) / 1e6
    if total > plan.weights_mb:
        raise ValueError(f"the weights in {result} have {total:.1f} MB, more than the {plan.weights_mb} of the recipe")
    stage.finish()
    return f"{stage.name}: finished, {total:.1f} MB of weights in {result}"


def _merged(values: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a layer over them: mappings join, everything else is replaced."""
    joined = dict(values)
    for key, value in layer.items():
        below = joined.get(key)
        joined[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return joined


def _moved(value: Any, base: str, here: str) -> Any:
    """Settings with every path below one folder put below another."""
    if isinstance(value, Mapping):
        return {key: _moved(entry, base, here) for key, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, base, here) for entry in value]
    if isinstance(value, str) and (value == base or value.startswith(f"{base}/")):
        return here + value[len(base) :]
    return value


def _needs(value: Any, names: Sequence[str] | Mapping[str, Any], out: str) -> tuple[str, ...]:
    """The stages whose results settings name."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        found = [name for entry in value for name in _needs(entry, names, out)]
        return tuple(dict.fromkeys(found))
    return tuple(name for name in names if isinstance(value, str) and f"{value}/".startswith(f"{out}/{name}/result/"))
