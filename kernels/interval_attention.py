"""Attention where a query row sees one range of keys, of one key set or of two in one launch.

Row r of the queries sees keys [start_r, end_r): every mask of next-scale models. With the scores

    s_rj = scale_h q_r . k_j - penalty |p_r - p_j|^2 + log w_r

(penalty of distance and weight w, a control's strength and soft mask, on the last key set alone) a key set gives

    O_r = w_r sum_j softmax_j(s_rj) v_j,     lse_r = log sum_j exp(s_rj)          where it has a softmax of its own
    O_r = sum_j softmax_j(s_rj) v_j          over the keys of both sets           "joint"

and backwards, with P = exp(s - lse) and delta_r = O_r . dO_r,

    dS = P (w dO v^T - delta + d_lse),   dV = P^T (w dO),   dK = scale dS^T q,   dQ = scale dS k,
    d scale_h = sum_r q_r . (dS k)_r,    d penalty = -sum_rj dS_rj |p_r - p_j|^2          (w = 1 in dS, dV if joint)

Two softmaxes leave their outputs side by side, so that two projections of them are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scaleweaver.kernels.attention import attend, attend_reference, merge
from scaleweaver.kernels.dispatch import runs_kernel
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.kernels.measured import kernel_is_faster

_LARGE_MASK = 2**16  # entries

_LARGEST_GRID = 65535  # programs that a launch may have along its second axis: rows times heads, of two softmaxes


@dataclass(frozen=True)
class Nearness:
    """What a score loses with distance: penalty (scalar) times |(at - keys_at) size|^2.

    at (L, 2) and keys_at (K, 2) are row and column as fractions of the picture, size (L, 2) the grid of the query.
    """

    penalty: Tensor
    at: Tensor
    size: Tensor
    keys_at: Tensor

    def squared_distances(self) -> Tensor:
        """(L, K), in cells of the query's own grid."""
        rows, columns = (((self.at[:, None, i] - self.keys_at[:, i]) * self.size[:, None, i]).square() for i in (0, 1))
        return rows + columns

    def between(self, queries: slice, keys: slice) -> Nearness:
        """The same for some of the queries and keys."""
        return replace(self, at=self.at[queries], size=self.size[queries], keys_at=self.keys_at[keys])

    def places(self) -> tuple[Tensor, Tensor]:
        """For the kernel: (L, 4) of at times size and size, (K, 2)."""
        return torch.cat((self.at * self.size, self.size), dim=1).float(), self.keys_at.float().contiguous()


@dataclass(frozen=True)
class KeySet:
    """Keys and values (Rk, H, K, D) and who sees them; row r of the queries reads row r % Rk, without a copy.

    weight (1 | R, L) float32, 0 or more, multiplies the exponentials of the scores and, in a softmax of its own, the
    output; a log-bias b is the weight exp(b). It is a setting, not a parameter: it gets no gradient.
    """

    k: Tensor
    v: Tensor
    ranges: KeyRanges
    weight: Tensor | None = None
    nearness: Nearness | None = None


def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges | None,
    *,
    nearness: Nearness | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attend` with key ranges for a mask, None where all rows see all keys; the dispatcher.

    k and v are (Rk, H, K, D), row r of the queries (R, H, L, D) reads row r % Rk: guidance branches share the keys of
    their image, which are not copied.

    In torch, rows that see different keys are different calls: for several scales that is faster than a mask.
    With no mask, no penalty and nobody who asks for the log-sum-exp, torch's own attention has it easy and does it,
    but for shapes at which the kernel was measured faster (measured.py).
    """
    plain = ranges is None and nearness is None and not return_lse
    if serves(q, k, v) and (not plain or (not _learns(q, k, v) and kernel_is_faster(q, k))):
        everything = KeyRanges(((q.shape[2], 0, k.shape[2]),))
        out, lse = interval_attention(q, KeySet(k, v, ranges or everything, nearness=nearness))
        return out[:, :, 0].transpose(1, 2), lse[:, 0] if return_lse else None  # (R, H, L, D), (R, H, L)
    if ranges is not None and splits(ranges, k.shape[2]):
        return _run_by_run(q, k, v, ranges, nearness, return_lse)
    mask = None if ranges is None else ranges.dense(k.shape[2], q.device)  # (L, K)
    if nearness is not None:
        near = -nearness.penalty * nearness.squared_distances()  # (L, K)
        mask = near if mask is None else near.masked_fill(~mask, -torch.inf)
    turns = q.shape[0] // max(k.shape[0], 1)
    if turns <= 1 or (k.shape[0] == 1 and not return_lse):
        return attend(q, k, v, mask=mask, return_lse=return_lse)
    # one call for each branch that shares the keys: a picture's numbers do not depend on its batch
    parts = [attend(part, k, v, mask=mask, return_lse=return_lse) for part in q.chunk(turns)]
    lses = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts]), torch.cat(lses) if lses else None  # (R, H, L, D), (R, H, L)


def splits(ranges: KeyRanges, keys: int) -> bool:
    """Whether to avoid hidden keys, call by call, is cheaper than to hide them: not for a few ones of a small mask."""
    counts = [(rows * (end - start), rows * keys) for rows, start, end in ranges.runs]
    seen, everything = (sum(column) for column in zip(*counts, strict=True))
    return all(count > 0 for count, _ in counts) and (everything >= _LARGE_MASK or 2 * seen <= everything)


def computed_pairs(ranges: KeyRanges, keys: int) -> int:
    """Pairs of query and key that `attend_ranges` computes in torch: those that are seen, or all of them and a mask."""
    if splits(ranges, keys):
        return sum(rows * (end - start) for rows, start, end in ranges.runs)
    return ranges.rows * keys


def _run_by_run(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, nearness: Nearness | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A call for each run of equal rows, on the keys that it sees: no mask, and no work on what one would hide."""
    results, row = [], 0
    for rows, start, end in ranges.runs:
        queries, keys = slice(row, row + rows), slice(start, end)
        near = None if nearness is None else nearness.between(queries, keys)
        part = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        results.append(attend_ranges(*part, None, nearness=near, return_lse=return_lse))
        row += rows
    lses = [lse for _, lse in results if lse is not None]
    out = torch.cat([out for out, _ in results], dim=2)  # (R, H, L, D)
    return out, torch.cat(lses, dim=2) if lses else None  # (R, H, L)


def interval_attention(
    q: Tensor, keys: KeySet, second: KeySet | None = None, *, joint: bool = False, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """q (R, H, L, D) -> out (R, L, S, H, D) and lse (R, S, H, L) float32, S = 2 for two softmaxes and 1 for one.

    `second` is another key set, `joint` gives both one softmax; scale is one number or one per head (H,).
    Differentiable in q, keys, values, scale and penalty, and in both results. A row that sees nothing gives 0, -inf.
    """
    _check(q, keys, second, joint)
    if not serves(q, keys.k, keys.v):
        return interval_attention_reference(q, keys, second, joint=joint, scale=scale)
    from scaleweaver.kernels.interval_attention_launch import Call, IntervalAttention, plan

    last = second or keys
    length = scale.float() if isinstance(scale, Tensor) else q.new_full((q.shape[1],), scale, dtype=torch.float32)
    penalty = None if last.nearness is None else last.nearness.penalty.float()
    pair = (None, None) if second is None else (second.k, second.v)
    call = Call(
        ranges=(keys.ranges,) if second is None else (keys.ranges, second.ranges),
        joint=joint,
        weight=None if last.weight is None else last.weight.float().contiguous(),
        places=None if last.nearness is None else last.nearness.places(),
        plan=plan(q),
    )
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of q
        result: tuple[Tensor, Tensor] = IntervalAttention.apply(
            q, length.contiguous(), penalty, keys.k, keys.v, *pair, call
        )
    return result


def interval_attention_reference(
    q: Tensor, keys: KeySet, second: KeySet | None = None, *, joint: bool = False, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, differentiable: the specification, and what runs without a GPU."""
    _check(q, keys, second, joint)
    q = q.float() * (scale.float()[:, None, None] if isinstance(scale, Tensor) else scale)
    results = [_one_softmax(q, part, joint) for part in (keys, second) if part is not None]
    if joint:
        results = [merge(*results[0], *results[1])]
    outs, lses = zip(*results, strict=True)
    return torch.stack(outs, dim=1).permute(0, 3, 1, 2, 4), torch.stack(lses, dim=1)  # (R, L, S, H, D), (R, S, H, L)


def _one_softmax(q: Tensor, keys: KeySet, joint: bool) -> tuple[Tensor, Tensor]:
    """out (R, H, L, D) and lse (R, H, L) of one key set; in a joint softmax the weight is in the lse alone."""
    turns = q.shape[0] // keys.k.shape[0]
    k, v = (x.repeat(turns, 1, 1, 1) if turns > 1 else x for x in (keys.k, keys.v))  # (R, H, K, D)
    mask = keys.ranges.dense(k.shape[2], q.device)  # (L, K)
    if keys.nearness is not None:
        near = -keys.nearness.penalty * keys.nearness.squared_distances()  # (L, K)
        mask = near.masked_fill(~mask, -torch.inf)
    out, lse = attend_reference(q, k, v, mask=mask)
    if keys.weight is not None:
        lse = lse + keys.weight.log()[:, None]
        out = out if joint else (out * keys.weight[:, None, :, None]).to(out.dtype)
    return out, lse


def _check(q: Tensor, keys: KeySet, second: KeySet | None, joint: bool) -> None:
    if joint and second is None:
        raise ValueError("joint=True needs two key sets; pass second=, or joint=False")
    if second is not None and (keys.weight is not None or keys.nearness is not None):
        raise ValueError("weight and nearness belong to the last key set; set them on `second`")
    for part in (keys, second):
        if part is None:
            continue
        expected = (part.k.shape[0], q.shape[1], part.k.shape[2], q.shape[3])
        if part.k.shape != expected or part.v.shape != expected or q.shape[0] % expected[0]:
            raise ValueError(
                f"q {tuple(q.shape)} with k {tuple(part.k.shape)} and v {tuple(part.v.shape)}: expected k and v of one "
                "shape, with the heads and the head width of q, and a number of rows that divides the rows of q"
            )
        if part.ranges.rows != q.shape[2] or part.ranges.end > part.k.shape[2]:
            raise ValueError(
                f"key ranges for {part.ranges.rows} queries and {part.ranges.end} keys, but there are {q.shape[2]} "
                f"queries and {part.k.shape[2]} keys; make them for these scales"
            )
        weight = part.weight
        if weight is not None and (weight.requires_grad or weight.shape not in ((1, q.shape[2]), q.shape[::2][:2])):
            raise ValueError(
                f"weight {tuple(weight.shape)} of requires_grad={weight.requires_grad}: expected (1 | rows, queries) = "
                f"(1 | {q.shape[0]}, {q.shape[2]}) without gradient"
            )


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these tensors. No tiles of wide float32 heads fit a GPU's registers."""
    widest = 64 if q.is_cuda and q.dtype == torch.float32 else 128
    fits = 16 <= q.shape[3] <= widest and q.shape[3] % 8 == 0 and 0 < 2 * q.shape[0] * q.shape[1] <= _LARGEST_GRID
    return runs_kernel(q) and q.dtype == k.dtype == v.dtype and fits
