"""What a Hugging Face Space runs; elsewhere `scaleweaver demo` opens the same page."""

from __future__ import annotations

import importlib.util

# where a Space lends GPUs, its package wants to come before torch
if importlib.util.find_spec("spaces") is not None:
    import spaces  # noqa: F401

from scaleweaver.commands.loading import load_pipeline
from scaleweaver.demo.page import launch
from scaleweaver.demo.studio import Studio

MODEL = "toybox"  # or a Hub id

if __name__ == "__main__":
    launch(Studio(load_pipeline(MODEL)))
