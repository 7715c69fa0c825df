"""How the bits of all scales add up to the latent, and what the next scale reads.

Residual binary spherical codes as in Infinity (arXiv 2412.04431): scale k contributes unit vectors of +-1/sqrt(d),
up-sampled to the final grid and summed. With `patch` p the tokenizer works on a grid p times as fine as the
transformer's, and a transformer token carries the d * p * p bits of its p x p positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.kernels.bit_sampling import unit_codes, unpack_codes
from scaleweaver.schedule import ScaleSchedule, ScaleStep


@dataclass(frozen=True)
class ScaleCode:
    """What residual quantisation did at one scale, in tokenizer layout."""

    step: ScaleStep
    residual: Tensor  # (B, d, ph, pw) area-resized rest that this scale had to describe
    bits: Tensor  # (B, ph, pw, d) uint8, the signs of that rest
    latent: Tensor  # (B, d, Hl, Wl) sum of all codes up to this scale


@dataclass(frozen=True)
class TeacherForcing:
    """What the transformer reads at all scales of a picture, and what it should say."""

    inputs: Tensor  # (B, L - n_0, D) of all scales but the first
    labels: Tensor  # (B, L, D) uint8
    magnitudes: Tensor  # (B, L, D) |rest| that each bit stands for
    latent: Tensor  # (B, d, Hl, Wl) sum of all codes


@dataclass(frozen=True)
class ResidualTarget:
    """Sum-of-codes target; `bits` per tokenizer position (d), `patch` positions per transformer token and axis (p)."""

    bits: int
    patch: int = 1

    @property
    def width(self) -> int:
        """Bits per transformer token, D = d * p * p."""
        return self.bits * self.patch**2

    def grid(self, step: ScaleStep) -> tuple[int, int]:
        """The step's grid in tokenizer positions."""
        return step.h * self.patch, step.w * self.patch

    def final_grid(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Size of the latent."""
        h, w = schedule.final_grid
        return h * self.patch, w * self.patch

    def pack(self, bits: Tensor) -> Tensor:
        """Tokenizer layout (B, ph, pw, d) -> transformer layout (B, n, D); channel order c*p*p + dy*p + dx."""
        x = F.pixel_unshuffle(bits.permute(0, 3, 1, 2), self.patch)  # (B, D, h, w)
        return x.flatten(2).transpose(1, 2)  # (B, n, D)

    def unpack(self, bits: Tensor, step: ScaleStep) -> Tensor:
        """Transformer layout (B, n, D) -> tokenizer layout (B, ph, pw, d)."""
        self._check_bits(bits, step)
        x = bits.transpose(1, 2).unflatten(2, (step.h, step.w))  # (B, D, h, w)
        return F.pixel_shuffle(x, self.patch).permute(0, 2, 3, 1)  # (B, ph, pw, d)

    def codes(self, bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Bits (..., d) -> +-1/sqrt(d), unit vectors along the last axis."""
        return unit_codes(bits, self.bits, dtype)

    def initial(
        self,
        batch: int,
        schedule: ScaleSchedule,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The empty sum, (B, d, Hl, Wl)."""
        return torch.zeros(batch, self.bits, *self.final_grid(schedule), device=device, dtype=dtype)

    def absorb(self, latent_sum: Tensor, bits: Tensor, step: ScaleStep) -> Tensor:
        """Running latent (B, d, Hl, Wl) plus the codes of transformer-layout bits (B, n, D)."""
        self._check_bits(bits, step)
        codes = unpack_codes(bits, (step.h, step.w), self.patch, latent_sum.dtype)  # (B, d, ph, pw)
        return self._lift(latent_sum, codes, step)

    def next_input(self, latent_sum: Tensor, step: ScaleStep) -> Tensor:
        """What the transformer reads at `step`: the running latent sampled down to its grid, (B, n, D)."""
        x = _bilinear(latent_sum, self.grid(step))  # (B, d, ph, pw)
        return F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)  # (B, n, D)

    def quantize(self, latent: Tensor, schedule: ScaleSchedule, flips: Sequence[Tensor] = ()) -> Iterator[ScaleCode]:
        """Residual quantisation of (B, d, Hl, Wl), one ScaleCode per scale.

        `flips[k]` (B, ph, pw, d) marks bits of scale k that enter the sum inverted: later scales then describe a rest
        that contains the mistake, while `bits` stays what should have been said.
        """
        self.check_latent(latent, schedule)
        total = torch.zeros_like(latent)
        for step in schedule.steps:
            rest = latent - total
            if not step.is_last:
                rest = F.interpolate(rest, size=self.grid(step), mode="area")  # (B, d, ph, pw)
            bits = (rest > 0).permute(0, 2, 3, 1)  # (B, ph, pw, d)
            said = bits ^ flips[step.index].bool() if step.index < len(flips) else bits
            total = self._add(total, said, step)
            yield ScaleCode(step, rest, bits.to(torch.uint8), total)

    def labels(self, latent: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher forcing: inputs (B, L - n_0, D) of all scales but the first, labels (B, L, D), final latent."""
        forced = self.teacher_forcing(latent, schedule)
        return forced.inputs, forced.labels, forced.latent

    def self_correct(
        self,
        latent: Tensor,
        schedule: ScaleSchedule,
        strength: float = 0.3,
        layers: int = 13,
        generator: torch.Generator | None = None,
        flips: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Bitwise self-correction: teacher forcing on a history with flipped bits, labels that repair it.

        Each of the first `layers` scales draws one flip probability from 0, .01, ..., strength for the whole batch.
        Returns inputs (B, L - n_0, D), labels (B, L, D), flip masks (B, ph, pw, d); given `flips` are used as they are.
        """
        if flips is None:
            device = generator.device if generator is not None else latent.device
            flips = self.draw_flips(latent.shape[0], schedule, strength, layers, generator, device)
        masks = [mask.to(latent.device) for mask in flips]  # (B, ph, pw, d)
        forced = self.teacher_forcing(latent, schedule, masks)
        return forced.inputs, forced.labels, masks

    def draw_flips(
        self,
        rows: int,
        schedule: ScaleSchedule,
        strength: float,
        layers: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """Flip masks (B, ph, pw, d) as `self_correct` draws them for a batch of so many rows."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} is no probability; pass a value from 0 to 1")
        masks = []
        for step in schedule.steps[: max(layers, 0)]:
            percent = torch.randint(0, int(100 * strength) + 1, (), generator=generator, device=device)
            noise = torch.rand((rows, *self.grid(step), self.bits), generator=generator, device=device)
            masks.append(noise < percent / 100)  # (B, ph, pw, d)
        return masks

    def teacher_forcing(self, latent: Tensor, schedule: ScaleSchedule, flips: Sequence[Tensor] = ()) -> TeacherForcing:
        """All that one pass of `quantize` gives for training."""
        scales = list(self.quantize(latent, schedule, flips))
        labels = torch.cat([self.pack(scale.bits) for scale in scales], dim=1)  # (B, L, D)
        rests = torch.cat([self.pack(scale.residual.abs().permute(0, 2, 3, 1)) for scale in scales], dim=1)
        inputs = [self.next_input(a.latent, b.step) for a, b in pairwise(scales)]
        empty = latent.new_zeros(latent.shape[0], 0, self.width)  # a one-scale schedule has no inputs
        return TeacherForcing(torch.cat([empty, *inputs], dim=1), labels, rests, scales[-1].latent)

    def _add(self, latent_sum: Tensor, bits: Tensor, step: ScaleStep) -> Tensor:
        return self._lift(latent_sum, self.codes(bits, latent_sum.dtype).permute(0, 3, 1, 2), step)

    def _lift(self, latent_sum: Tensor, codes: Tensor, step: ScaleStep) -> Tensor:
        return latent_sum + (codes if step.is_last else _bilinear(codes, latent_sum.shape[-2:]))

    def _check_bits(self, bits: Tensor, step: ScaleStep) -> None:
        if bits.shape[1:] != (step.n, self.width):
            raise ValueError(
                f"bits of shape {tuple(bits.shape)} at a {step.h}x{step.w} scale: expected "
                f"(B, {step.n}, {self.width}), one row per transformer token; pack() tokenizer bits first"
            )

    def check_latent(self, latent: Tensor, schedule: ScaleSchedule) -> None:
        """The latent must lie on the schedule's final grid."""
        expected = (self.bits, *self.final_grid(schedule))
        if latent.ndim != 4 or latent.shape[1:] != expected:
            raise ValueError(
                f"latent of shape {tuple(latent.shape)}: expected (B, {', '.join(map(str, expected))}) for a "
                f"{schedule.height}x{schedule.width} schedule; resize the picture or choose its schedule"
            )


def _bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
