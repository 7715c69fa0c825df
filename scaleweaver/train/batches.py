"""Batches made ahead of the step that reads them, by background processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from scaleweaver.train.config import TrainConfig
    from scaleweaver.train.trainer import Recipe

AHEAD = 2  # batches that each background process keeps ready
_SHARED = Path("/dev/shm")  # through which processes of Linux hand each other tensors


class Batches:
    """The batches of a run in order, from number `start` on.

    `config.workers` processes make them; without any each is made when it is asked for. A batch is a pure function of
    its number, so they are the same either way. The processes are forks: what a recipe computes for a batch must not
    touch a GPU.
    """

    def __init__(self, recipe: Recipe, config: TrainConfig, start: int, device: torch.device) -> None:
        if config.workers and "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(f"workers is {config.workers}, but this system cannot fork processes; set workers to 0")
        self.recipe, self.size, self.workers, self.device = recipe, config.batch, config.workers, device
        self.waited = 0.0  # seconds that batches have kept the run waiting
        self._stream = self._made(range(start, config.steps * config.accumulate))

    def take(self) -> Any:
        """The next batch, on the device."""
        started = time.monotonic()
        batch = next(self._stream)
        self.waited += time.monotonic() - started
        return send_to_device(batch, self.device, non_blocking=self.workers > 0)

    def close(self) -> None:
        """Ends the background processes."""
        self._stream.close()

    def _made(self, numbers: range) -> Generator[Any, None, None]:
        ahead = numbers[1:] if self.workers else range(0)
        for number in numbers[: len(numbers) - len(ahead)]:
            batch = self.recipe.batch(number, self.size)
            check_room(batch, self.workers)  # the first one tells how large they are
            yield batch
        if ahead:
            yield from DataLoader(
                _Numbered(self.recipe, self.size),
                batch_size=None,  # an item is a batch
                sampler=ahead,
                num_workers=self.workers,
                prefetch_factor=AHEAD,
                collate_fn=_unchanged,
                pin_memory=self.device.type == "cuda",
                multiprocessing_context="fork",
                worker_init_fn=_in_one_thread,
                generator=torch.Generator(),  # else starting it would draw from the generator that drop-out uses
            )


def check_room(batch: Any, workers: int) -> None:
    """Refuses more batches than fit the memory that processes share."""
    if not workers or not _SHARED.is_dir():
        return
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    size = sum(value.nbytes for value in values if isinstance(value, Tensor))
    free, needed = shutil.disk_usage(_SHARED).free, size * workers * (AHEAD + 1)
    if needed > free:
        raise ValueError(
            f"{workers} workers keep {needed / 1e6:.0f} MB of batches in {_SHARED}, which has {free / 1e6:.0f}; "
            f"set workers to {free // (size * (AHEAD + 1))}, or make it larger (docker run --shm-size)"
        )


class _Numbered(Dataset[Any]):
    def __init__(self, recipe: Recipe, size: int) -> None:
        self.recipe, self.size = recipe, size

    def __getitem__(self, number: int) -> Any:
        return self.recipe.batch(number, self.size)


def _unchanged(batch: Any) -> Any:
    return batch


def _in_one_thread(worker: int) -> None:
    """Threads of the parent do not live on in a fork; torch sees to its own."""
    cv2.setNumThreads(0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
