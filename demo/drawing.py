"""One drawing as a stream: the picture after every scale, and at the end the pictures with their facts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from PIL import Image

from scaleweaver.contracts import Control
from scaleweaver.metadata import Picture
from scaleweaver.schedule import ScaleStep


@dataclass(frozen=True)
class Wish:
    """What a visitor asks for: the arguments of one call of the pipeline; `options` are those that were changed."""

    prompt: str
    controls: tuple[Control, ...] = ()
    seed: int = 0
    count: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "control": list(self.controls) or None,
            "seed": self.seed,
            "num_images_per_prompt": self.count,
            **self.options,
        }


@dataclass(frozen=True)
class Moment:
    """After one scale: a grid of h x w tokens, the last of `scales` when index is scales - 1."""

    index: int
    scales: int
    grid: tuple[int, int]
    pictures: list[Image.Image]


@dataclass(frozen=True)
class Drawn:
    """The end of a drawing.

    memory: bytes, on a GPU the most that were allocated, on a CPU the most that the process had at the ends of scales.
    """

    pictures: list[Picture]
    moments: list[Moment]
    seconds: float
    memory: int

    @property
    def tokens(self) -> int:
        return sum(moment.grid[0] * moment.grid[1] for moment in self.moments)

    def settings(self, image: int) -> dict[str, Any]:
        return self.pictures[image].settings


class _Stopped(Exception):
    """Nobody waits for this drawing any more."""


def draw(pipe: Any, wish: Wish, turn: threading.Lock) -> Iterator[Moment | Drawn]:
    """Draw a wish, one caller at a time (`turn`); closing the iterator ends the drawing after its present scale."""
    events: queue.SimpleQueue[Moment | Drawn | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    worker = threading.Thread(target=_work, args=(pipe, wish, turn, events, stop), daemon=True)
    worker.start()
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Drawn):
                return
    finally:
        stop.set()  # the drawing ends by itself; waiting for it would hold up all other visitors


def _work(pipe: Any, wish: Wish, turn: threading.Lock, events: Any, stop: threading.Event) -> None:
    """The thread that draws: the pipeline calls back after every scale, the page wants an iterator."""
    moments: list[Moment] = []
    memory = 0

    def follow(pipe: Any, index: int, step: ScaleStep, seen: dict[str, Any]) -> None:
        nonlocal memory
        if stop.is_set():
            raise _Stopped
        memory = max(memory, _memory(pipe.device))
        moments.append(Moment(index, len(step.schedule), (step.h, step.w), seen["preview"]()))
        events.put(moments[-1])

    try:
        while not turn.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            if pipe.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pipe.device)
            started = time.perf_counter()
            out = pipe(**wish.arguments, callback_on_step_end=follow)
            seconds = time.perf_counter() - started
        finally:
            turn.release()
        events.put(Drawn(out.images, moments, seconds, max(memory, _memory(pipe.device))))
    except _Stopped:
        return  # nobody reads any more
    except BaseException as error:  # belongs to the reader's thread
        events.put(error)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
