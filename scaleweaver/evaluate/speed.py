"""How long each stage of a picture takes, on any device, and what a process needed for it.

A stage ends with a lap of the `Stopwatch`: the clock on a CPU, an event in the queue on a GPU, so that timing a scale
does not make the host wait. Warm-up runs are kept apart. Things that are compared run in turn, so that other load on
the machine falls on all of them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scaleweaver.contracts import Route
from scaleweaver.doctor import processor
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleStep
from scaleweaver.threads import find_processors

PACKAGES = ("scaleweaver", "torch", "transformers", "diffusers", "numpy")
TOTAL = "total"


class Stopwatch:
    """Seconds between laps. On a GPU these are times of its queue, read once all is done."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._laps: list[tuple[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Begin again, when all that was asked of the device before is done."""
        self._synchronize()
        self._laps = [("", self._now())]

    def lap(self, stage: str) -> None:
        """What ran since the last lap was this stage; laps of the same name add up."""
        self._laps.append((stage, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds per stage in the order of their first laps, and their sum as "total"."""
        self._synchronize()
        seconds: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._laps, self._laps[1:], strict=False):
            passed = before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            seconds[stage] = seconds.get(stage, 0.0) + passed
        return {**seconds, TOTAL: sum(seconds.values())}

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self._synchronize()
        return time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


@dataclass
class StageTimes:
    """Seconds of the stages in several runs of one thing, the first runs apart."""

    runs: list[dict[str, float]] = field(default_factory=list)
    warmup: list[dict[str, float]] = field(default_factory=list)

    def minimum(self, stage: str = TOTAL) -> float:
        return min(run[stage] for run in self.runs)

    def median(self, stage: str = TOTAL) -> float:
        return median(run[stage] for run in self.runs)

    @property
    def stages(self) -> list[str]:
        """In the order they ran, "total" last."""
        return list(self.runs[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        stages = {
            stage: {"min": round(self.minimum(stage), 5), "median": round(self.median(stage), 5)}
            for stage in self.stages
        }
        first = {stage: round(seconds, 5) for stage, seconds in self.warmup[0].items()} if self.warmup else None
        return {"repeats": len(self.runs), "stages": stages, "first_run": first}


def measure(
    ways: Mapping[str, Callable[[Stopwatch], Any]],
    device: torch.device | str = "cpu",
    *,
    repeats: int = 5,
    warmup: int = 1,
    seconds: float | None = None,
) -> dict[str, StageTimes]:
    """Every way in turn, `repeats` times over; what a way runs after its last lap is the stage "rest".

    With `seconds` no further round begins once so much time has passed, but there is always one.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats}, warmup is {warmup}; pass at least 1 and 0")
    times = {name: StageTimes() for name in ways}
    watch, began = Stopwatch(device), time.perf_counter()
    for round_number in range(warmup + repeats):
        late = seconds is not None and time.perf_counter() - began > seconds
        if late and round_number > warmup:
            break
        for name, way in ways.items():
            watch.start()
            way(watch)
            watch.lap("rest")
            found = watch.read()
            (times[name].warmup if round_number < warmup else times[name].runs).append(found)
    return times


def ratio(slow: StageTimes, fast: StageTimes, stage: str = TOTAL) -> float:
    """How many times faster, from the best run of each: other load only ever adds."""
    return slow.minimum(stage) / fast.minimum(stage)


class _Timed:
    """A router that ends the stage "conditions": the loop asks it a second time for the first scale when it begins."""

    def __init__(self, network: Any, watch: Stopwatch) -> None:
        self.network, self.watch, self.asked = network, watch, 0

    def route(self, step: ScaleStep) -> Route:
        if step.index == 0:
            self.asked += 1
            if self.asked == 2:
                self.watch.lap("conditions")
        return Route(self.network)


def draw(
    pipe: VARControlPipeline,
    prompt: str | None,
    watch: Stopwatch,
    *,
    control: Mapping[str, Any] | None = None,
    decode: bool = True,
    **call: Any,
) -> Tensor:
    """One call of a pipeline with a lap after each stage: text, control, conditions, every scale, decoding.

    `call` are further arguments of the pipeline, `prompt_embeds` in place of a prompt among them. Returns the latent.
    """
    plan: dict[str, Any] = {name: call.get(name) for name in ("height", "width", "schedule")}
    if prompt is not None:
        call["prompt_embeds"] = pipe.encode_prompt(prompt)
        watch.lap("text encoding")
    if control:
        control = {kind: pipe.encode_control(image, kind, **plan) for kind, image in control.items()}
        watch.lap("control encoding")

    def after(pipe: Any, index: int, step: ScaleStep, values: Mapping[str, Any]) -> None:
        watch.lap(f"scale {index + 1}, {step.h}x{step.w}")

    network = pipe.transformer if pipe.graphs is None else pipe.graphs
    drawn: Any = pipe(
        control=control or None, router=_Timed(network, watch), callback_on_step_end=after, output_type="latent", **call
    )
    latent: Tensor = drawn.latent
    watch.lap("rest")
    if decode:
        pipe.preview(latent)
        watch.lap("decoding")
    return latent


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a result must say of where it was measured."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "processor": processor(), "cores": find_processors().cores, "threads": torch.get_num_threads(),
        "system": platform.platform(), "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }  # fmt: skip
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def peak_rss() -> int | None:
    """The largest resident set that this process has had, in bytes; None where the system does not say.

    It never falls: compare configurations in processes of their own, see `in_fresh_process`.
    """
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def in_fresh_process(command: Sequence[str], *, threads: int | None = None, timeout: float = 600) -> dict[str, Any]:
    """Run a Python command line whose last line of output is JSON, and return that."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
