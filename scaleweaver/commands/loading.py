"""The pipeline of a command: its device and number format chosen, progress bars where somebody looks."""

from __future__ import annotations

import sys
from typing import Any


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """`VARControlPipeline.from_pretrained` on the best device there is, or on the named one."""
    import diffusers
    import torch
    import transformers

    from scaleweaver.pipeline import VARControlPipeline
    from scaleweaver.precision import read_dtype

    # their bars count files, ours counts scales
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    pipe = VARControlPipeline.from_pretrained(model, dtype=read_dtype(dtype, device)).to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe
