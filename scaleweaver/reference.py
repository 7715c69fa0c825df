"""Attention of generated tokens to reference tokens that were computed once: the primitive behind control.

A `ReferenceBank` holds the keys and values of a reference (a control image) for every scale; a `ReferenceInjector`
lets the image queries of chosen layers read them, with a softmax of their own ("separate") or in one softmax with the
image's own history ("joint"). Joint attention is the merge of the two results weighted by their log-sum-exp, so both
fusions run the same two attentions:

    separate   X <- X + gamma1 (Wo O_self + s Z O_ref)
    joint      X <- X + gamma1 Wo ((1 - w) O_self + w O_ref),   w = sigmoid(lse_ref + log s - lse_self)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.contracts import Injection, Steps
from scaleweaver.guidance import per_scale
from scaleweaver.kernels.attention import merge
from scaleweaver.kernels.interval_attention import KeySet, Nearness, attend_ranges, serves
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.masks import key_ranges
from scaleweaver.schedule import ScaleSchedule, ScaleStep

Fusion = Literal["separate", "joint"]
Scope = Literal["same", "causal"]
Position = Literal["before_gate", "after_gate"]


class ReferenceReader(Protocol):
    """How the image reads a reference: the trained part that an injector needs."""

    @property
    def fusion(self) -> Fusion: ...

    @property
    def scope(self) -> Scope: ...

    @property
    def z_position(self) -> Position: ...

    def project(self, layer: int, attended: Tensor) -> Tensor:
        """Attention result (R, H, L, D) -> what the residual stream receives (R, L, C)."""
        ...

    def penalty(self, layer: int) -> Tensor | None:
        """What the score of a key loses per squared grid cell of distance (scalar), None for nothing."""
        ...


def active(index: int, scales: int, start: float = 0.0, end: float = 1.0) -> bool:
    """Whether scale `index` of `scales` lies in the window, by the rule of diffusers' `control_guidance_start/end`."""
    return not (index / scales < start or (index + 1) / scales > end)


def strengths(
    scale: float | Sequence[float],
    scales: int,
    *,
    start: float = 0.0,
    end: float = 1.0,
    among: Collection[int] | None = None,
) -> tuple[float, ...]:
    """One strength per scale of the schedule, zero outside the window and, if given, for what is not `among`."""
    values = per_scale(scale, scales, "control scale")
    if not 0 <= start <= end <= 1:
        raise ValueError(f"control window start={start}, end={end}: expected 0 <= start <= end <= 1")
    if min(values) < 0:
        raise ValueError(f"control scale {min(values)} is negative; pass 0 (off) or more")
    return tuple(
        value if active(index, scales, start, end) and (among is None or index in among) else 0.0
        for index, value in enumerate(values)
    )


def scale_indices(scales: slice | Sequence[int], count: int) -> tuple[int, ...]:
    """The chosen ones of `count` scales in ascending order; negative indices count from the last."""
    if isinstance(scales, slice):
        return tuple(sorted(range(count)[scales]))
    try:
        return tuple(sorted({range(count)[index] for index in scales}))
    except (TypeError, IndexError):
        raise ValueError(
            f"scales is {scales!r}; pass a slice, a range or a list of indices from 0 to {count - 1}"
        ) from None


def token_mask(mask: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Soft spatial mask (B, 1, height, width) in 0..1 -> weight of every token (B, T), averaged over its area."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"control mask of shape {tuple(mask.shape)}: expected (B, 1, height, width)")
    grids = [F.interpolate(mask.float(), size=(step.h, step.w), mode="area").flatten(1) for step in schedule.steps]
    return torch.cat(grids, dim=1)  # (B, T)


@dataclass(frozen=True)
class ReferenceBank:
    """Keys and values (Bc, H, T, D) of all T tokens of a schedule, per layer; one row serves any number of images."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    schedule: ScaleSchedule

    @property
    def rows(self) -> int:
        """Bc, the number of different references."""
        return next(iter(self.values.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.values.values())).device

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for part in (self.keys, self.values) for x in part.values())

    def select_rows(self, rows: Tensor) -> ReferenceBank:
        """The bank for other rows (R',) int64; a bank of one row serves them all and is not copied."""
        if self.rows == 1:
            return self
        rows = rows.to(self.device)
        keys = {layer: k[rows] for layer, k in self.keys.items()}
        return replace(self, keys=keys, values={layer: v[rows] for layer, v in self.values.items()})

    def to(self, device: torch.device | str) -> ReferenceBank:
        """The bank on another device."""
        keys = {layer: k.to(device) for layer, k in self.keys.items()}
        return replace(self, keys=keys, values={layer: v.to(device) for layer, v in self.values.items()})

    @classmethod
    def join(cls, banks: Sequence[ReferenceBank]) -> ReferenceBank:
        """The rows of several banks of one control and schedule."""
        keys, values = (
            {layer: torch.cat([part[layer] for part in parts]) for layer in banks[0].values}
            for parts in ([bank.keys for bank in banks], [bank.values for bank in banks])
        )
        return cls(keys, values, banks[0].schedule)

    def read(self, layer: int, steps: Steps, scope: Scope) -> tuple[Tensor, Tensor]:
        """Keys and values (Bc, H, K, D) that `steps` may see: their own scales, or all up to them."""
        start, stop = (steps[0].start if scope == "same" else 0), steps[-1].start + steps[-1].n
        return self.keys[layer][:, :, start:stop], self.values[layer][:, :, start:stop]

    def check(self, steps: Steps) -> None:
        """The picture must have the grids that the reference was encoded for."""
        for step in steps:
            known = self.schedule.grids[step.index] if step.index < len(self.schedule.grids) else None
            if known != (step.h, step.w):
                raise ValueError(
                    f"the control was encoded for a {self.schedule.height}x{self.schedule.width} picture, where scale "
                    f"{step.index} is {known}, not {(step.h, step.w)} as here; encode the control for this size"
                )


def reference_ranges(steps: Steps, scope: Scope) -> KeyRanges | None:
    """Who of the tokens of `steps` sees which key of `ReferenceBank.read`; None when all see all."""
    if len(steps) == 1:
        return None
    if scope == "same":
        return key_ranges(steps, "same_scale")
    return key_ranges(steps, "block_causal", steps[0].start)


def nearness(steps: Steps, scope: Scope, penalty: Tensor, device: torch.device) -> Nearness:
    """The penalty of distance between the tokens of `steps` and the keys of `ReferenceBank.read`."""
    return Nearness(penalty, *_places(tuple(steps), scope, device))


@lru_cache(maxsize=64)
def _places(steps: tuple[ScaleStep, ...], scope: Scope, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of `steps` lie (L, 2), the grids they lie on (L, 2), and where the keys lie (K, 2)."""
    known = steps if scope == "same" else (*steps[0].schedule.steps[: steps[0].index], *steps)
    # a tensor made under inference_mode could not be used for training later
    with torch.inference_mode(False):
        at, keys_at = (torch.cat([_centres(step.h, step.w, device) for step in each]) for each in (steps, known))
        grids = [torch.tensor([step.h, step.w]).expand(step.n, 2) for step in steps]
        return at, torch.cat(grids).to(device), keys_at


def _centres(h: int, w: int, device: torch.device) -> Tensor:
    """Row and column of every cell's centre as fractions of the picture, (h w, 2)."""
    row, column = (torch.arange(n, device=device).add(0.5) / n for n in (h, w))
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)  # (h w, 2)


class _Row(NamedTuple):
    """What one row of a call reads: rows of the bank and of the weights, if it reads at all."""

    bank: int
    weight: int
    sees: bool


class ReferenceInjector:
    """Reads one bank inside the self-attention of the bank's layers; implements `contracts.Injector`.

    strengths: one number per scale (see the function of that name). sees_control: which guidance branches read the
    control. mask (1 | images, 1, height, width) in 0..1 limits where it acts. images is needed where rows differ:
    with several bank or mask rows it is their number unless given, with a blind branch it must be given. A bank has 1
    row, one per image, or one per row of the call (branches * images). Guidance branches share the keys and values of
    their image, which are not copied.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        reader: ReferenceReader,
        strengths: Sequence[float],
        sees_control: Sequence[bool] = (True,),
        mask: Tensor | None = None,
        images: int | None = None,
    ) -> None:
        self.bank = bank
        self.reader = reader
        # a shortened run knows fewer scales than the bank
        missing = len(bank.schedule) - len(strengths)
        self.strengths = (*(float(value) for value in strengths), *[0.0] * missing)
        per_token = [self.strengths[step.index] for step in bank.schedule.steps for _ in range(step.n)]
        self.weights = torch.tensor(per_token, device=bank.device)[None]  # (1, T)
        if mask is not None:
            self.weights = self.weights * token_mask(mask.to(bank.device), bank.schedule)  # (B, T)
        self._arrange(self._assign_rows(len(sees_control), tuple(sees_control), images))

    def _assign_rows(self, branches: int, sees: tuple[bool, ...], images: int | None) -> tuple[_Row, ...] | None:
        rows = max(self.bank.rows, self.weights.shape[0])
        if rows == 1 and all(sees):
            return None  # all rows are alike, however many a call has
        if images is None and rows == 1:
            raise ValueError("a guidance branch does not see the control: pass images= to tell which rows it has")
        images = images or rows
        total = branches * images
        if self.bank.rows not in (1, images, total) or self.weights.shape[0] not in (1, images):
            raise ValueError(
                f"{self.bank.rows} encoded controls and {self.weights.shape[0]} masks for {images} images in "
                f"{branches} branches; pass 1 or {images} of each"
            )
        return tuple(
            _Row(row % self.bank.rows, row % images % self.weights.shape[0], sees[row // images])
            for row in range(total)
        )

    def _arrange(self, rows: tuple[_Row, ...] | None) -> None:
        """Who reads what, worked out once: between scales nobody asks the device."""
        self.rows = rows
        everybody = rows is None or all(row.sees for row in rows)
        readers = [index for index, row in enumerate(rows or ()) if row.sees]
        self.blind = bool(rows) and not readers
        self.seen = None if everybody else _sent(readers, self.bank.device)  # of a call's rows
        self.bank_rows: slice | Tensor = slice(None)
        self.weight_rows: slice | Tensor = slice(None)
        if rows:
            # the first of the branches that read: row r of the readers gets row r % len(bank_rows)
            self.bank_rows = _index(_period([rows[index].bank for index in readers]), self.bank.device)
            if self.weights.shape[0] > 1:
                self.weight_rows = _index([rows[index].weight for index in readers], self.bank.device)

    def needs_lse(self, layer: int) -> bool:
        """Only joint attention weighs the two results."""
        return self.reader.fusion == "joint" and layer in self.bank.values and any(self.strengths)

    def select_rows(self, rows: Tensor) -> ReferenceInjector:
        """The injector for other rows (R',) int64 of the present ones; the bank is shared, not copied."""
        chosen = copy.copy(self)
        if self.rows is not None:
            chosen._arrange(tuple(self.rows[row] for row in rows.tolist()))
        return chosen

    def keys(self, layer: int, steps: Steps, q: Tensor) -> KeySet | None:
        """Where a kernel reads the image's own keys: those of several scales, as in training, and those of "joint"."""
        alone = len(steps) == 1 and self.reader.fusion == "separate"
        if alone or self.seen is not None or not self._acts(layer, steps, q):
            return None
        k, v, ranges, near = self._read(layer, steps)
        if not serves(q, k, v):
            return None
        return KeySet(k, v, ranges or KeyRanges(((q.shape[2], 0, k.shape[2]),)), nearness=near)

    def inject(
        self,
        layer: int,
        steps: Steps,
        q: Tensor,
        attended: Tensor,
        lse: Tensor | None,
        read: tuple[Tensor, Tensor] | None = None,
    ) -> Injection:
        """See `contracts.Injector.inject`."""
        if not self._acts(layer, steps, q):
            return Injection(attended)
        weight = self.weights[self.weight_rows, steps[0].start : steps[-1].start + steps[-1].n]  # (R | 1, L)
        seen, joint = self.seen, self.reader.fusion == "joint"
        out: Tensor
        out_lse: Tensor | None
        if read is None:
            k, v, ranges, near = self._read(layer, steps)
            readers = (q if seen is None else q[seen]).to(v.dtype)
            out, out_lse = attend_ranges(readers, k, v, ranges, nearness=near, return_lse=joint)  # (R, H, L, D)
        else:
            out, out_lse = read
        if joint:
            merged, merged_lse = self._join(attended, lse, out, out_lse, weight, seen)
            return Injection(merged, lse=merged_lse)
        branch = weight[..., None].to(out.dtype) * self.reader.project(layer, out)  # (R, L, C)
        if seen is not None:  # blind rows receive nothing
            branch = branch.new_zeros(q.shape[0], *branch.shape[1:]).index_copy(0, seen, branch)  # (R, L, C)
        before = self.reader.z_position == "before_gate"
        return Injection(attended, branch if before else None, None if before else branch)

    def tables(self, steps: Steps) -> tuple[Tensor, ...]:
        """Remembered tensors that are read besides the bank: who wrote down where they lie must hold them."""
        penalised = any(self.reader.penalty(layer) is not None for layer in self.bank.values)
        return _places(tuple(steps), self.reader.scope, self.bank.device) if penalised else ()

    def _acts(self, layer: int, steps: Steps, q: Tensor) -> bool:
        """Whether anything is read; raises where the call is another than the control was prepared for."""
        if layer not in self.bank.values or not any(self.strengths[step.index] for step in steps):
            return False
        # nobody reads, yet in training every process goes back through the condition stream, or others wait for it
        if self.blind and not torch.is_grad_enabled():
            return False
        self.bank.check(steps)
        if self.rows is not None and len(self.rows) != q.shape[0]:
            raise ValueError(
                f"the control was prepared for {len(self.rows)} rows but the call has {q.shape[0]}; check images="
            )
        return True

    def _read(self, layer: int, steps: Steps) -> tuple[Tensor, Tensor, KeyRanges | None, Nearness | None]:
        """Keys and values (Rk, H, K, D), row r of those that read has row r % Rk; who sees which; the penalty."""
        scope, penalty = self.reader.scope, self.reader.penalty(layer)
        k, v = (x[self.bank_rows] for x in self.bank.read(layer, steps, scope))  # (Rk, H, K, D)
        near = None if penalty is None else nearness(steps, scope, penalty, k.device)
        return k, v, reference_ranges(steps, scope), near

    @staticmethod
    def _join(
        attended: Tensor, lse: Tensor | None, out: Tensor, out_lse: Tensor | None, weight: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if lse is None or out_lse is None:
            raise ValueError("joint attention needs the log-sum-exp of the plain attention; ask needs_lse() first")
        # the strength multiplies the exponentials of the reference, so 0 leaves the plain attention
        out_lse = out_lse + weight.log()[:, None]  # (R, H, L)
        if seen is None:
            return merge(attended, lse, out, out_lse)
        merged, merged_lse = merge(attended[seen], lse[seen], out, out_lse)
        return attended.index_copy(0, seen, merged), lse.index_copy(0, seen, merged_lse)


def _period(rows: list[int]) -> list[int]:
    """The shortest list that, repeated, is this one: what one guidance branch has, where all branches have the same."""
    lengths = (n for n in range(1, len(rows) + 1) if len(rows) % n == 0)
    return next((rows[:n] for n in lengths if rows[:n] * (len(rows) // n) == rows), [])


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    """An index of these rows, a slice where they follow one another: taking them copies nothing then."""
    first = rows[0] if rows else 0
    if rows == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return _sent(rows, device)


def _sent(rows: list[int], device: torch.device) -> Tensor:
    """Row indices on a device, which the host does not wait for: rows change between scales."""
    pinned = device.type == "cuda"
    return torch.tensor(rows, dtype=torch.long, pin_memory=pinned).to(device, non_blocking=pinned)
