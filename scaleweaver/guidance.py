"""Guidance: several branches of one call, and how their logits become one.

Classifier-Free Diffusion Guidance (arXiv 2207.12598), on logits as in Infinity (arXiv 2412.04431): a weight of 1 is
off. Rows lie branch by branch, [text | null] or [text + control | null + control | null], each B images. A branch whose
weight is 0 at this and every later scale is dead: the loop drops its rows, which changes nothing but the cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

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

    @property
    def sees_control(self) -> tuple[bool, ...]:
        """Per branch, whether controls act on it: on both halves, so that text alone is what guidance amplifies."""
        return (True,) * self.branches

    def alive(self, step: ScaleStep) -> int:
        return 1 if set(self.scale[step.index :]) == {1.0} else 2

    def combine(self, logits: Tensor, step: ScaleStep) -> Tensor:
        s = 1.0 if self.insert_after is not None else self.scale[step.index]
        return weighted_sum(logits.chunk(self.alive(step)), (s, 1 - s))  # (B, L, X)

    def mix(self, layer: int, x: Tensor, step: ScaleStep) -> Tensor:
        if layer != self.insert_after or self.alive(step) == 1:
            return x
        s = self.scale[step.index]
        mixed = weighted_sum(x.chunk(2), (s, 1 - s))  # (B, L, C)
        return torch.cat([mixed, mixed])  # (2B, L, C)


class ControlGuidance:
    """Text and control weighed apart: l = l(0,0) + g_c (l(0,c) - l(0,0)) + g_t (l(t,c) - l(0,c)).

    Three branches [text + control | null + control | null]; without the third when g_c is 1 everywhere (then it is
    classifier-free guidance with the control in both halves). InstructPix2Pix (arXiv 2211.09800), equation 3, with the
    roles of text and picture exchanged. `steps` is needed only when neither scale is a list.
    """

    def __init__(
        self, text_scale: float | Sequence[float], control_scale: float | Sequence[float], steps: int | None = None
    ) -> None:
        if steps is None:
            lengths = [len(scale) for scale in (text_scale, control_scale) if isinstance(scale, Sequence)]
            steps = lengths[0] if lengths else 1
        self.text_scale = per_scale(text_scale, steps, "guidance_scale")
        self.control_scale = per_scale(control_scale, steps, "control_guidance_scale")

    @property
    def branches(self) -> int:
        return self._needed(0)

    @property
    def sees_control(self) -> tuple[bool, ...]:
        """Per branch, whether controls act on it."""
        return (True, True, False)[: self.branches]

    def alive(self, step: ScaleStep) -> int:
        return self._needed(self._at(step))

    def combine(self, logits: Tensor, step: ScaleStep) -> Tensor:
        text, control = self.text_scale[self._at(step)], self.control_scale[self._at(step)]
        return weighted_sum(logits.chunk(self.alive(step)), (text, control - text, 1 - control))  # (B, L, X)

    def mix(self, layer: int, x: Tensor, step: ScaleStep) -> Tensor:
        return x

    def _needed(self, index: int) -> int:
        if set(self.control_scale[index:]) != {1.0}:
            return 3
        return 1 if set(self.text_scale[index:]) == {1.0} else 2

    def _at(self, step: ScaleStep) -> int:
        return step.index if len(self.text_scale) > 1 else 0  # two plain numbers are kept once


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of the parts times their weights; a part of weight 0 is not touched, one of weight 1 is passed as it is."""
    terms = [
        part if weight == 1 else part * weight for part, weight in zip(parts, weights, strict=False) if weight != 0
    ]
    return sum(terms[1:], start=terms[0])
