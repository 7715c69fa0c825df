"""Logits to bits: temperature, top-k, top-p, and one random stream per image.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431): every bit is
a choice between two values, so top-k is either off (2 and more) or the likelier value (1), and top-p = t drops the
rarer one when its probability is at most 1 - t.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleweaver.guidance import per_scale
from scaleweaver.kernels.bit_sampling import sample_bits
from scaleweaver.schedule import ScaleStep


@dataclass(frozen=True)
class BitwiseSampler:
    """All bits of a scale at once; `temperature` is one number or one per scale, top_k = 0 and top_p = 0 are off.

    Differs from the paper: temperature divides the mixed logits, not those of each branch, which is the same number.
    """

    temperature: float | Sequence[float] = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        count = len(self.temperature) if isinstance(self.temperature, Sized) else 1
        if min(per_scale(self.temperature, count, "temperature"), default=0) <= 0:
            raise ValueError(f"temperature is {self.temperature}; pass numbers above 0, top_k=1 for the likeliest bits")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k}, top_p is {self.top_p}; pass top_k >= 0 and top_p from 0 to 1")

    def tempered(self, logits: Tensor, step: ScaleStep) -> Tensor:
        """Guided logits (B, L, N) as they are sampled from, float32."""
        return logits.float() / self._temperature(step)

    def sample(self, logits: Tensor, step: ScaleStep, generators: Sequence[torch.Generator]) -> Tensor:
        """logits (B, L, N), log-odds of 1 -> bits (B, L, N) uint8; image i draws from generators[i]."""
        # two numbers a bit, one for each value: what drawing from a softmax over two classes takes
        noise = None if self.top_k == 1 else exponential((*logits.shape, 2), generators, logits.device)  # (B, L, N, 2)
        return sample_bits(logits, noise, temperature=self._temperature(step), top_p=self.top_p)  # (B, L, N)

    def _temperature(self, step: ScaleStep) -> float:
        return per_scale(self.temperature, len(step.schedule), "temperature")[step.index]


def draw(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Classes drawn from p (B, ..., V), not necessarily normalised -> (B, ...) int64.

    argmax p / e with e ~ Exp(1): what torch.multinomial computes, with the noise of image i from generators[i].
    """
    return (p / exponential(p.shape, generators, p.device).to(p.dtype)).argmax(dim=-1)


def exponential(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Exp(1) noise of shape (B, ...) float32, that of image i from generators[i]."""
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} images; pass one per image")
    # page-locked memory reaches a GPU without a stop: the host draws the noise of a scale while the GPU computes it
    pinned = device.type == "cuda" and all(generator.device.type == "cpu" for generator in generators)
    noise = torch.empty(tuple(shape), dtype=torch.float32, device="cpu" if pinned else device, pin_memory=pinned)
    for row, generator in zip(noise, generators, strict=True):
        if row.device == generator.device:
            row.exponential_(generator=generator)
        else:
            row.copy_(torch.empty(row.shape, device=generator.device).exponential_(generator=generator))
    return noise.to(device, non_blocking=True)
