"""Who may attend to whom, as one range of keys per query row.

A mask of next-scale models is always an interval: row i sees keys [start_i, end_i), and all rows of a scale see the
same. Dense masks and kernels derive from that. One scale on its own needs no mask: it sees the whole history and
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from scaleweaver.kernels.key_ranges import LARGEST_KEPT, KeyRanges, dense
from scaleweaver.schedule import ScaleStep

__all__ = ["LARGEST_KEPT", "Kind", "dense", "key_ranges", "row_ranges", "scale_mask"]

Kind = Literal["block_causal", "same_scale"]


def key_ranges(steps: Sequence[ScaleStep], kind: Kind, history: int = 0) -> KeyRanges:
    """The key range of every token of `steps`, behind `history` cached keys.

    "block_causal": all history and all scales up to the row's own. "same_scale": the row's own scale alone.
    """
    if kind not in ("block_causal", "same_scale"):
        raise ValueError(f'mask kind {kind!r} is unknown; pass "block_causal" or "same_scale"')
    counts = [step.n for step in steps]
    runs = zip(counts, accumulate(counts, initial=history), strict=False)  # tokens, and where they start
    return KeyRanges(tuple((n, 0 if kind == "block_causal" else start, start + n) for n, start in runs))


def row_ranges(steps: Sequence[ScaleStep], kind: Kind, history: int = 0) -> tuple[Tensor, Tensor]:
    """`key_ranges` as (start, end), each (T,) int32."""
    start, end = key_ranges(steps, kind, history).spans(torch.device("cpu"))
    return start, end


def scale_mask(steps: Sequence[ScaleStep], kind: Kind, history: int = 0, device: torch.device | None = None) -> Tensor:
    """The dense mask (T, history + T) of these scales, remembered per ranges and device unless it is large."""
    tokens = sum(step.n for step in steps)
    return key_ranges(steps, kind, history).dense(history + tokens, device or torch.device("cpu"))
