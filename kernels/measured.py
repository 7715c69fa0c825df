"""What was measured where no mask exists: torch's attention or the interval kernel, for one GPU and shape.

`attention_times.json` beside this file is a list of timings, each an object with the fields of `Timing`: "capability"
as [major, minor], "dtype" as "bfloat16", "torch_ms" of the fastest of torch's own backends and "kernel_ms", a forward
pass each, "device" and "versions" in words. `record` writes them. While the list is empty, as long as nobody has
measured, torch's attention serves every such call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

SHIPPED = Path(__file__).with_name("attention_times.json")
DTYPES = ("float32", "float16", "bfloat16")
NEAR = 1.5  # a timing speaks for shapes whose queries and keys are at most so many times more or fewer


@dataclass(frozen=True)
class Timing:
    """One shape on one GPU: R rows of H heads, L queries and K keys of width D, milliseconds a call."""

    capability: tuple[int, int]
    head_width: int
    dtype: str
    rows: int
    heads: int
    queries: int
    keys: int
    torch_ms: float
    kernel_ms: float
    device: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        counts = (self.head_width, self.rows, self.heads, self.queries, self.keys)
        times = (self.torch_ms, self.kernel_ms)
        if self.dtype not in DTYPES or min(counts) < 1 or not all(math.isfinite(t) and t > 0 for t in times):
            raise ValueError(
                f"{self}: expected a dtype of {', '.join(DTYPES)}, counts from 1 on and times above 0; measure it again"
            )

    @property
    def shape(self) -> tuple[object, ...]:
        """What was timed; a newer timing of the same replaces the older."""
        return (self.capability, self.head_width, self.dtype, self.rows, self.heads, self.queries, self.keys)


@dataclass(frozen=True, eq=False)
class _Table:
    """Timings that hash by identity, so that a choice is looked up without looking at them."""

    timings: tuple[Timing, ...]


_table: ContextVar[_Table | None] = ContextVar("attention_times", default=None)


def load(path: Path = SHIPPED) -> tuple[Timing, ...]:
    """The timings of a file, checked."""
    known = {field.name for field in fields(Timing)}
    found = []
    for entry in json.loads(path.read_text()):
        if not isinstance(entry, dict) or not known - {"device", "versions"} <= set(entry) <= known:
            raise ValueError(f"{path}: {entry} is no timing; expected an object with {', '.join(sorted(known))}")
        major, minor = entry["capability"]
        found.append(Timing(**{**entry, "capability": (major, minor)}))
    return tuple(found)


def record(timings: Iterable[Timing], path: Path = SHIPPED) -> None:
    """Write timings into a file, beside those of other GPUs and shapes that it holds."""
    kept = {timing.shape: timing for timing in (*(load(path) if path.exists() else ()), *timings)}
    lines = [json.dumps(asdict(kept[shape])) for shape in sorted(kept)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    _shipped.cache_clear()
    _choose.cache_clear()


@contextmanager
def use_timings(timings: Iterable[Timing]) -> Iterator[None]:
    """Choose by these instead of the shipped ones. A CPU has the capability (0, 0)."""
    token = _table.set(_Table(tuple(timings)))
    try:
        yield
    finally:
        _table.reset(token)


def kernel_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel was measured faster than torch for q (R, H, L, D) that sees all of k (Rk, H, K, D)."""
    table = _table.get() or _shipped()
    return bool(table.timings) and _choose(table, _capability(q.device), q.dtype, q.shape, k.shape[2])


@lru_cache(maxsize=1024)
def _choose(table: _Table, capability: tuple[int, int], dtype: torch.dtype, queries: torch.Size, keys: int) -> bool:
    """By the nearest timing, in ratios of queries, keys and rows times heads; far from all of them torch it is."""
    rows, heads, tokens, width = queries

    def distance(timing: Timing) -> tuple[float, float]:
        apart = [abs(math.log(timing.queries / tokens)), abs(math.log(timing.keys / keys))]
        return max(apart), abs(math.log(timing.rows * timing.heads / (rows * heads)))

    kind = (capability, width, str(dtype).removeprefix("torch."))
    alike = [timing for timing in table.timings if (timing.capability, timing.head_width, timing.dtype) == kind]
    near = [timing for timing in alike if distance(timing)[0] <= math.log(NEAR)]
    if not near:
        return False
    nearest = min(near, key=distance)
    return nearest.kernel_ms < nearest.torch_ms


@cache
def _shipped() -> _Table:
    return _Table(load())


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
