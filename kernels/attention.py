"""Softmax attention: out = softmax(scale * q k^T) v, and lse = log sum exp(scale * q k^T) of every query.

With (out, lse) of two key sets, the softmax over both sets together is an exact weighted sum of the two outputs:
`merge`. That lets one primitive serve a separate softmax per key set and a joint one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q (R, H, L, D), k and v (R or 1, H, K, D) -> out (R, H, L, D) and, if asked for, lse (R, H, L) float32.

    mask is boolean, (L, K) or (R, 1, L, K) or anything that broadcasts to it, True where a query may see a key; or
    floating, added to the scores. A query that sees no key gives 0 and lse -inf.
    """
    if k.shape[0] != q.shape[0]:  # one row of keys for all rows of queries: a view, not a copy
        k = k.expand(q.shape[0], -1, -1, -1)
        v = v.expand(q.shape[0], -1, -1, -1)
    if return_lse:
        return attend_reference(q, k, v, mask=mask, scale=scale)
    if q.device.type == "cpu" and v.dtype == torch.bfloat16 and torch.is_grad_enabled() and v.requires_grad:
        # the fused backward of bfloat16 on CPUs takes four times as long as the formula
        return _attend_plain(q, k, v, mask, scale), None  # (R, H, L, D)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None  # (R, H, L, D)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The formula written out, scores and softmax in float32; differentiable in both results."""
    scores = _scores(q, k, scale)  # (R, H, L, K)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, dim=-1)  # (R, H, L)
    # subtracting -inf from -inf would give nan where nothing is visible
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # (R, H, L, K)
    return weights.to(v.dtype) @ v, lse  # (R, H, L, D), (R, H, L)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = _scores(q, k, scale)  # (R, H, L, K)
    if mask is None or mask.dtype != torch.bool:
        return (scores if mask is None else scores + mask).softmax(-1).to(v.dtype) @ v  # (R, H, L, D)
    # a finite floor keeps gradients of rows without any key free of nan
    weights = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(-1)  # (R, H, L, K)
    out = weights.to(v.dtype) @ v  # (R, H, L, D)
    visible = mask.any(-1, keepdim=True)
    return out if visible.all() else out * visible


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    with outside_autocast(q):
        return (q.float() * scale if scale != 1.0 else q.float()) @ k.float().transpose(-2, -1)


def outside_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast for x's device, nor an error where there is none: tensors of the meta device tell shapes alone."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two key sets together, from the (out (R, H, L, D), lse (R, H, L)) of each alone."""
    lse = torch.logaddexp(lse1, lse2)  # (R, H, L)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    w1, w2 = torch.exp(lse1 - safe)[..., None], torch.exp(lse2 - safe)[..., None]  # (R, H, L, 1)
    return (out1 * w1 + out2 * w2).to(out1.dtype), lse
