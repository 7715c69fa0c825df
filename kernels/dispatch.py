"""Whether a Triton kernel or its torch reference runs, and kernels that are made at their first launch.

The kernels have not run on a GPU yet, so they are asked for: SCALEWEAVER_KERNELS=1 in the environment. Then a kernel
serves CUDA tensors but those of float64, on GPUs from compute capability 8.0 on, where Triton is installed; everything
else gets the reference, and so does torch.compile. `use_kernels` forces either side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ASK = "SCALEWEAVER_KERNELS"

_choice: ContextVar[bool | None] = ContextVar("use_kernels", default=None)


class Kernel:
    """A function in Triton's language as a kernel, launched as `kernel[grid](...)`.

    Triton is optional and takes a while to import: the first launch does both, and gives the function's module its
    `tl` and `cast`. Under TRITON_INTERPRET=1 the kernel runs on CPU tensors.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    @cached_property
    def jit(self) -> Any:
        """What Triton compiles."""
        import triton
        import triton.language

        from scaleweaver.kernels.cast_triton import cast

        self.function.__globals__.update(tl=triton.language, cast=cast)
        return triton.jit(self.function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(first: Tensor, *arguments: Any, **options: Any) -> None:
            with torch.cuda.device_of(first):  # Triton launches on the current GPU, which may be another one
                self.jit[grid](first, *arguments, **options)

        return launch


@contextmanager
def use_kernels(on: bool) -> Iterator[None]:
    """Force the kernels, or the references, whatever the tensors are."""
    token = _choice.set(on)
    try:
        yield
    finally:
        _choice.reset(token)


def runs_kernel(x: Tensor) -> bool:
    """Whether kernels work on x here, or their references."""
    if torch.compiler.is_compiling():  # the compiler fuses the references by itself
        return False
    choice = _choice.get()
    if choice is not None:
        return choice
    served = x.is_cuda and x.dtype != torch.float64
    return served and asked_for() and gpu_is_served(x.device)


def asked_for() -> bool:
    """Whether the environment asks for the kernels."""
    return os.environ.get(ASK) == "1"


@cache
def gpu_is_served(device: torch.device) -> bool:
    """Whether the kernels are made for this GPU, and Triton is there."""
    if torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
