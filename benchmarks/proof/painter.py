"""Pictures from prompts, drawn in this process or by several that hold a pipeline each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from scaleweaver import Control, VARControlPipeline
from scaleweaver.evaluate.fidelity import Drawing
from scaleweaver.train.data import Pixels

_OWN: list[Drawing] = []  # of a worker, filled when it starts


class Painter:
    """One picture per prompt, with the seed `seed` + its key; a picture depends neither on its batch nor on a worker.

    With 2 or more `workers` each of so many processes draws batches with one thread: small networks gain more from
    that than from threads.
    """

    def __init__(self, pipe: Any, model: str, *, seed: int, batch: int, workers: int = 1) -> None:
        self.batch = batch
        self.drawing = Drawing(pipe, seed, 1, batch, {})
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # forked processes would inherit the locks of torch's threads
            self._pool = ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=_start, initargs=(model, seed, batch)
            )

    def draw(self, prompts: Sequence[str], keys: Sequence[int], control: Control | None = None) -> Pixels:
        """(B, H, W, 3); a control holds a list of one map each."""
        if self._pool is None:
            return self.drawing.draw(prompts, keys, control)
        parts = []
        for start in range(0, len(keys), self.batch):
            some = slice(start, start + self.batch)
            own = None if control is None else replace(control, image=control.image[some])
            parts.append(self._pool.submit(_draw, list(prompts[some]), list(keys[some]), own))
        return np.concatenate([part.result() for part in parts])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def load(model: str) -> Any:
    """A pipeline that shows no progress."""
    pipe = VARControlPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _start(model: str, seed: int, batch: int) -> None:
    torch.set_num_threads(1)
    _OWN.append(Drawing(load(model), seed, 1, batch, {}))


def _draw(prompts: list[str], keys: list[int], control: Control | None) -> Pixels:
    return _OWN[0].draw(prompts, keys, control)
