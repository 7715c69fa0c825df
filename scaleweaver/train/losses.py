"""Cross-entropy of bits over the scales of a schedule.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.schedule import ScaleSchedule


def bit_loss(
    logits: Tensor,
    labels: Tensor,
    schedule: ScaleSchedule,
    reweight: bool = True,
    magnitudes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, T, N), the log-odds of 1; labels (B, T, N) in {0, 1}.

    Returns the loss, the mean bit cross-entropy per scale (S,) in nats and the share of right bits per scale (S,), the
    last without gradient. With `reweight` a token of scale k weighs 1 / sqrt(n_k), otherwise all tokens weigh the same.
    `magnitudes` (B, T, N) weigh the bits within each scale: those of the rests that the bits stand for make the loss
    forget signs of next to nothing (ours, no paper's).
    """
    counts = torch.tensor([step.n for step in schedule.steps])
    if logits.shape != labels.shape or len(counts) == 0:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; pass one per bit")
    if logits.shape[1] != schedule.length:
        raise ValueError(f"{logits.shape[1]} tokens given, the schedule has {schedule.length}; truncate one of them")
    logits = logits.float()
    target = labels.to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # (B, T, N)
    right = ((logits.detach() > 0) == (target > 0)).float()  # (B, T, N)
    sizes = counts.tolist()
    parts = entropy.split(sizes, dim=1)
    if magnitudes is not None:
        weighed = zip(parts, magnitudes.to(entropy.dtype).split(sizes, dim=1), strict=True)
        parts = tuple(part * m / m.mean().clamp_min(1e-6) for part, m in weighed)
    per_scale = torch.stack([part.mean() for part in parts])  # (S,)
    accuracy = torch.stack([part.mean() for part in right.split(sizes, dim=1)])  # (S,)
    # n_k tokens of weight 1 / sqrt(n_k) make sqrt(n_k) for the scale
    weights = counts.to(per_scale).sqrt() if reweight else counts.to(per_scale)
    return (per_scale * weights).sum() / weights.sum(), per_scale, accuracy
