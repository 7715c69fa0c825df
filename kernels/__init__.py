"""Kernels of scaleweaver; import them as `scaleweaver.kernels.<name>`, also from a checkout."""

from __future__ import annotations


def _step_aside() -> None:
    """Let Hugging Face's package `kernels` win where a checkout's root on `sys.path` makes this folder take its name.

    transformers, diffusers and peft import theirs when it is installed; finding ours instead would break their import.
    """
    import importlib
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    ours = sys.modules.pop("kernels")
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if os.path.realpath(entry or os.curdir) != root]
    try:
        importlib.import_module("kernels")
    except ImportError:  # not installed: stay, with a version that no library mistakes for a usable one
        sys.modules["kernels"] = ours
    finally:
        sys.path[:] = path


if __name__ == "kernels":
    __version__ = "0"
    _step_aside()
