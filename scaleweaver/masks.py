"""Who may attend to whom, as one range of keys per query row.

A mask of next-scale models is always an interval: row i sees keys [start_i, end_i). Dense masks and kernels derive from
the two vectors. One scale on its own needs no mask: it sees the whole history and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from scaleweaver.schedule import ScaleStep

Kind = Literal["block_causal", "same_scale"]
LARGEST_KEPT = 16 * 2**20  # bytes of a mask that stays on its device between calls, one byte per entry


def row_ranges(steps: Sequence[ScaleStep], kind: Kind, history: int = 0) -> tuple[Tensor, Tensor]:
    """(start, end), each (T,) int32: the key range of every token of `steps`, behind `history` cached keys.

    "block_causal": all history and all scales up to the row's own. "same_scale": the row's own scale alone.
    """
    if kind not in ("block_causal", "same_scale"):
        raise ValueError(f'mask kind {kind!r} is unknown; pass "block_causal" or "same_scale"')
    counts = torch.tensor([step.n for step in steps])
    ends = counts.cumsum(0) + history  # (S,)
    starts = torch.zeros_like(ends) if kind == "block_causal" else ends - counts
    return starts.repeat_interleave(counts).int(), ends.repeat_interleave(counts).int()  # (T,), (T,)


def dense(start: Tensor, end: Tensor, keys: int) -> Tensor:
    """Key ranges (T,) -> boolean mask (T, keys), True where the row may see the key."""
    index = torch.arange(keys, device=start.device)
    return (index >= start[:, None]) & (index < end[:, None])


def scale_mask(steps: Sequence[ScaleStep], kind: Kind, history: int = 0, device: torch.device | None = None) -> Tensor:
    """The dense mask (T, history + T) of these scales, remembered per schedule, kind and device unless it is large."""
    tokens = sum(step.n for step in steps)
    make = _small_mask if tokens * (history + tokens) <= LARGEST_KEPT else _mask
    return make(tuple(steps), kind, history, device or torch.device("cpu"))


@lru_cache(maxsize=8)
def _small_mask(steps: tuple[ScaleStep, ...], kind: Kind, history: int, device: torch.device) -> Tensor:
    return _mask(steps, kind, history, device)


def _mask(steps: tuple[ScaleStep, ...], kind: Kind, history: int, device: torch.device) -> Tensor:
    # a tensor made under inference_mode could not be used for training later
    with torch.inference_mode(False):
        start, end = row_ranges(steps, kind, history)
        return dense(start, end, history + len(start)).to(device)
