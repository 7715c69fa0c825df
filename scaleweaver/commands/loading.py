"""The pipeline of a command: its device and number format chosen, progress bars where somebody looks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scaleweaver.threads import set_threads


def load_pipeline(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    quantize: str | None = None,
    threads: int | None = None,
) -> Any:
    """`VARControlPipeline.from_pretrained` on the best device there is, or on the named one.

    threads: how many torch may use on a CPU, for the whole program; one per core unless given.
    """
    with no_collection():
        import diffusers
        import torch
        import transformers

        from scaleweaver.pipeline import VARControlPipeline
        from scaleweaver.precision import read_dtype
        from scaleweaver.quantize import check_format

        if quantize is not None:
            check_format(quantize)
        # their bars count files, ours counts scales
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        set_threads(threads)
        pipe = VARControlPipeline.from_pretrained(model, dtype=read_dtype(dtype, device)).to(device)
    if quantize is not None:
        pipe.quantize(quantize)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


@contextmanager
def no_collection() -> Iterator[None]:
    """Imports make a million objects that all stay; to look for garbage among them takes a fifth of the start."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
