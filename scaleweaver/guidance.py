"""Guidance: several branches of one call, and how their logits become one.

Classifier-Free Diffusion Guidance (arXiv 2207.12598), on logits as in Infinity (arXiv 2412.04431): a weight of 1 is
off. Rows lie branch by branch, [text | null] or [text + controls | null + controls | null | null + some controls], each
B images. A branch whose weight is 0 at this and every later scale is dead: the loop drops its rows, which changes
nothing but the cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from scaleweaver.kernels.bit_sampling import weighted_sum
from scaleweaver.schedule import ScaleStep


def per_scale(value: float | Sequence[float], steps: int, name: str) -> tuple[float, ...]:
    """One finite number per scale: a single number is repeated, a list must have `steps` entries.

    Numbers and lists may also be numpy's or torch's.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    try:
        values = tuple(float(v) for v in plain) if isinstance(plain, Iterable) else (float(plain),) * steps
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; pass one number or a list of {steps}") from None
    if len(values) != steps:
        raise ValueError(f"{name} has {len(values)} values but there are {steps} scales; pass one number or {steps}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} is {value}; every value must be a finite number")
    return values


class ClassifierFreeGuidance:
    """l = s l(text) + (1 - s) l(null), s per scale; two branches, or one when s is 1 everywhere.

    With `insert_after` = i the hidden state after layer i is mixed instead of the logits: both branches go on with the
    mixture, each with its own text, and the logits are those of the text branch.
    """

    def __init__(self, scale: float | Sequence[float], steps: int, insert_after: int | None = None) -> None:
        if insert_after is not None and insert_after < 0:
            raise ValueError(f"insert_after is {insert_after}; pass the index of a layer, counted from 0, or None")
        self.scale = per_scale(scale, steps, "guidance_scale")
        self.insert_after = insert_after

    @property
    def branches(self) -> int:
        return 1 if set(self.scale) == {1.0} else 2

    def sees_control(self, control: int) -> tuple[bool, ...]:
        """Per branch, whether a control acts on it: on both halves, so that text alone is what guidance amplifies."""
        return (True,) * self.branches

    def alive(self, step: ScaleStep) -> int:
        return 1 if set(self.scale[step.index :]) == {1.0} else 2

    def weights(self, step: ScaleStep) -> tuple[float, ...]:
        """What the logits of each branch that is alive count."""
        s = 1.0 if self.insert_after is not None else self.scale[step.index]
        return (s, 1 - s)[: self.alive(step)]

    def combine(self, logits: Tensor, step: ScaleStep) -> Tensor:
        return weighted_sum(logits.chunk(self.alive(step)), self.weights(step))  # (B, L, X)

    def mix(self, layer: int, x: Tensor, step: ScaleStep) -> Tensor:
        if layer != self.insert_after or self.alive(step) == 1:
            return x
        s = self.scale[step.index]
        mixed = weighted_sum(x.chunk(2), (s, 1 - s))  # (B, L, C)
        return torch.cat([mixed, mixed])  # (2B, L, C)


class ControlGuidance:
    """Text and every control weighed apart.

    With c all controls, and c_j those that share the weight g_j, l(text, controls) is

        l = l(0,c) + g_t (l(t,c) - l(0,c)) + sum_j (g_j - 1) (l(0,c_j) - l(0,0))

    For one weight for all controls this is l(0,0) + g_c (l(0,c) - l(0,0)) + g_t (l(t,c) - l(0,c)): InstructPix2Pix
    (arXiv 2211.09800), equation 3, with the roles of text and picture exchanged. For several weights it is a
    generalisation of our own (inferred): it does not depend on the order of the controls, and a weight of 1 is off.

    Branches are [t, c | 0, c | 0, 0 | 0, c_1 | 0, c_2 | ...]. A group whose weight is 1 everywhere has none, one of all
    controls needs none beside the second, and those that are needed longest come first.
    """

    def __init__(
        self,
        text_scale: float | Sequence[float],
        control_scales: Sequence[float | Sequence[float]],
        steps: int,
    ) -> None:
        self.text = per_scale(text_scale, steps, "guidance_scale")
        self.own = [per_scale(scale, steps, "control_guidance_scale") for scale in control_scales]
        off = (1.0,) * steps
        groups = sorted({scale for scale in self.own if scale != off}, key=lambda scale: (-_last(scale), scale))
        shared = len(set(self.own)) == 1
        self.all = groups[0] if groups and shared else off  # the weight of all controls together
        self.parts = [] if shared else groups

    @property
    def branches(self) -> int:
        return self._needed(0)

    def sees_control(self, control: int) -> tuple[bool, ...]:
        """Per branch, whether the control at this place of `control_scales` acts on it."""
        return (True, True, False, *(scale == self.own[control] for scale in self.parts))[: self.branches]

    def alive(self, step: ScaleStep) -> int:
        return self._needed(step.index)

    def weights(self, step: ScaleStep) -> tuple[float, ...]:
        """What the logits of each branch that is alive count."""
        text, together = self.text[step.index], self.all[step.index]
        parts = [scale[step.index] - 1 for scale in self.parts]
        return (text, together - text, 1 - together - sum(parts), *parts)[: self.alive(step)]

    def combine(self, logits: Tensor, step: ScaleStep) -> Tensor:
        return weighted_sum(logits.chunk(self.alive(step)), self.weights(step))  # (B, L, X)

    def mix(self, layer: int, x: Tensor, step: ScaleStep) -> Tensor:
        return x

    def _needed(self, index: int) -> int:
        """Leading branches with a weight at this or a later scale."""
        parts = sum(_last(scale) >= index for scale in self.parts)
        if parts or _last(self.all) >= index:
            return 3 + parts
        return 2 if _last(self.text) >= index else 1


def _last(scale: Sequence[float]) -> int:
    """The last scale whose weight is not 1, -1 if there is none."""
    return max((index for index, weight in enumerate(scale) if weight != 1), default=-1)
