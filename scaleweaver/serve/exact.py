"""Which pictures of a batch could have come out otherwise on their own.

Matrix products of other shapes round otherwise, so logits of the same picture differ in their last digits between
batches. A bit is drawn by comparing a logit with noise: only where both almost agree can rounding decide it. `Watch`
draws as `BitwiseSampler` does and finds those pictures: they are drawn again alone, all others have the bits that they
have alone, as far as the bound holds. Worth it in float32; in 16 bits rounding decides in almost every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleweaver.guidance import per_scale
from scaleweaver.kernels.bit_sampling import sample_bits
from scaleweaver.sampling import BitwiseSampler, exponential
from scaleweaver.schedule import ScaleStep

# how far rounding may move a guided logit of the built-in model on a CPU: above the differences in
# benchmarks/results/serve.json, which benchmarks/serve.py measures; a bound from measurement, not a proof
ROUNDING = 1e-4


def measured_rounding(pipe: Any) -> float | None:
    """`ROUNDING` for pipelines that draw as those it was measured on: on a CPU in float32."""
    on_cpu: bool = pipe._execution_device.type == "cpu"
    return ROUNDING if on_cpu and pipe.transformer.dtype == torch.float32 else None


class Watch:
    """A sampler that remembers in `doubtful`, the numbers of images, where a bit hung on the rounding of its logit."""

    def __init__(self, sampler: BitwiseSampler, rounding: float) -> None:
        self.sampler, self.rounding = sampler, rounding
        self.doubtful: set[int] = set()

    def sample(self, logits: Tensor, step: ScaleStep, generators: Sequence[torch.Generator]) -> Tensor:
        shape = (*logits.shape, 2)
        noise = None if self.sampler.top_k == 1 else exponential(shape, generators, logits.device)  # (B, L, N, 2)
        temperature = per_scale(self.sampler.temperature, len(step.schedule), "temperature")[step.index]
        low, bits, high = (
            sample_bits(logits + slack, noise, temperature=temperature, top_p=self.sampler.top_p)  # (B, L, N)
            for slack in (-self.rounding, 0.0, self.rounding)
        )
        # a larger logit never turns a 1 into a 0, so what holds at both ends holds in between
        found = (low != high).flatten(1).any(dim=1)  # (B,)
        self.doubtful.update(found.nonzero().flatten().tolist())
        return bits
