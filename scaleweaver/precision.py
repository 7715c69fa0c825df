"""Which number format a device computes in, and number formats by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def auto_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """What dtype="auto" means on a device: bfloat16 where its hardware multiplies in it, float32 elsewhere.

    Without a device it is the GPU where there is one, else the CPU.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fast = False
    if target.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(target):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif target.type == "cpu":
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we run on
        fast = bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def read_dtype(dtype: torch.dtype | str | None, device: torch.device | str | None = None) -> torch.dtype:
    """A dtype from its name, "auto" (see `auto_dtype`) or None (float32)."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return auto_dtype(device)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype={dtype!r}; pass torch.float32, torch.bfloat16, torch.float16 or "auto"')
    return found


def fuses_linear(x: Tensor) -> bool:
    """Whether oneDNN may run a linear layer of x together with the function behind it: on x86, without gradients."""
    busy = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not busy and bool(torch.backends.mkldnn.enabled) and _fused_format(x.dtype)


@cache
def _fused_format(dtype: torch.dtype) -> bool:
    vector = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_is_mkldnn_bf16_supported"))
    if not (vector and torch.backends.mkldnn.is_available() and known):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def other_than_float32(dtype: torch.dtype) -> str | None:
    """The name that settings keep of a number format; None for float32, which needs no word."""
    return None if dtype == torch.float32 else str(dtype).removeprefix("torch.")
