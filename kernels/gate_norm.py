"""From a branch back into the residual stream, and the norm that the next branch reads, in one pass.

For a token x (C numbers), the branch's output y and its gate g:

    x' = x + g y                                   no gate: g = 1; no branch: x' = x; further terms may be added
    h  = LN(x') (1 + a) + b                        AdaLN: scale a and shift b of the token's row
    h  = LN(x') w + b                              `affine`: weight and bias of a LayerNorm

LN(x) = (x - mean x) / sqrt(var x + eps). In torch every operation reads and writes the float32 stream; the kernel
reads x and y once and writes x' and h once, h in the dtype of the layer that follows. The backward pass keeps x' and y.
With z = LN(x'), e the gradient of h times (1 + a) or w, and dx' the gradient that x' got from elsewhere:

    dx = dx' + (e - mean e - z mean(e z)) / sqrt(var x' + eps)      dy = g dx      dg = sum y dx
    da = sum z dh                                                   db = sum dh    sums over the tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaleweaver.kernels.dispatch import Kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

    from scaleweaver.kernels.cast_triton import cast
    from scaleweaver.kernels.compile_gate import Build

_TOKENS = 16  # that a program of the backward pass adds up


def gate_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    affine: bool = False,
    terms: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x, branch, terms (R, L, C), gate (R or 1, 1, C) -> x' with x's dtype and h with `dtype`, None for x's; (R, L, C).

    scale and shift are (R or 1, 1, C), with `affine` (C,); `terms` are added to x' without a gate.
    """
    if not runs_kernel(x):
        return gate_norm_reference(x, branch, gate, scale, shift, eps=eps, affine=affine, terms=terms, dtype=dtype)
    extra = terms[0] if len(terms) == 1 else sum(terms, start=torch.zeros_like(x)) if terms else None  # (R, L, C)
    joined, h = _fused(x, branch, gate, extra, scale, shift, eps, affine, dtype or x.dtype)
    return joined, h


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) * (1 + scale) + shift, the norm without weights; x (R, L, C), scale and shift (R or 1, 1, C)."""
    if not runs_kernel(x):
        return modulate_reference(x, scale, shift, eps, dtype=dtype)
    (h,) = _fused(x, None, None, None, scale, shift, eps, False, dtype or x.dtype)
    return h


def gate_norm_reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    affine: bool = False,
    terms: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in torch; differentiable."""
    x = sum(terms, start=x + branch if gate is None else torch.addcmul(x, gate, branch))  # (R, L, C)
    if not affine:
        return x, modulate_reference(x, scale, shift, eps, dtype=dtype)
    h = F.layer_norm(x, x.shape[-1:], scale.to(x.dtype), shift.to(x.dtype), eps)
    return x, h if dtype is None else h.to(dtype)


def modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm and its modulation in torch; differentiable."""
    h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    return h if dtype is None else h.to(dtype)


@Kernel
def _forward(
    x, branch, gate, extra, scale, shift, x_out, h_out, total, tokens, gate_row, scale_row, shift_row, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr,
    EXTRA: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]  # (TILE, 1), of all rows
    row, c = token // tokens, tl.arange(0, BLOCK)[None]
    ok = (token < total) & (c < C)  # (TILE, BLOCK)
    at = token * C + c
    # to float32 at once: the interpreter's arithmetic on bfloat16 is wrong
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if BRANCH:
        added = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
        if GATE:
            added *= tl.load(gate + row * gate_row + c, mask=ok, other=0.0).to(tl.float32)
        value += added
        if EXTRA:
            value += tl.load(extra + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(x_out + at, cast(value, x_out.dtype.element_ty), mask=ok)
    centred = tl.where(ok, value - (tl.sum(value, 1) / C)[:, None], 0.0)
    z = centred * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps))[:, None]
    factor = tl.load(scale + row * scale_row + c, mask=ok, other=0.0).to(tl.float32)
    if not AFFINE:
        factor += 1.0
    h = z * factor + tl.load(shift + row * shift_row + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(h_out + at, cast(h, h_out.dtype.element_ty), mask=ok)


@Kernel
def _backward(
    x, branch, gate, scale, dx_out, dh, dx, dbranch, sums, tokens, gate_row, scale_row, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BRANCH: tl.constexpr,
    GATE: tl.constexpr, KEPT: tl.constexpr, AFFINE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    chunk, row, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    factor = tl.load(scale + row * scale_row + c, mask=c < C, other=0.0).to(tl.float32)[None]
    if not AFFINE:
        factor += 1.0
    if GATE:
        g = tl.load(gate + row * gate_row + c, mask=c < C, other=0.0).to(tl.float32)[None]
    gate_sum, scale_sum, shift_sum = c * 0.0, c * 0.0, c * 0.0
    for tile in range(chunk * TILES, tl.minimum((chunk + 1) * TILES, tl.cdiv(tokens, TILE))):
        token = tile * TILE + tl.arange(0, TILE)[:, None]  # (TILE, 1)
        ok = (token < tokens) & (c < C)[None]  # (TILE, BLOCK)
        at = (row * tokens + token) * C + c[None]
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        centred = tl.where(ok, value - (tl.sum(value, 1) / C)[:, None], 0.0)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps))[:, None]
        z = centred * inverse
        given = tl.load(dh + at, mask=ok, other=0.0).to(tl.float32)
        e = given * factor
        d = (e - (tl.sum(e, 1) / C)[:, None] - z * (tl.sum(e * z, 1) / C)[:, None]) * inverse
        if BRANCH:
            d += tl.load(dx_out + at, mask=ok, other=0.0).to(tl.float32)
            if GATE:
                tl.store(dbranch + at, cast(d * g, dbranch.dtype.element_ty), mask=ok)
                if KEPT:
                    gate_sum += tl.sum(d * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32), 0)
        tl.store(dx + at, cast(d, dx.dtype.element_ty), mask=ok)
        if SUMS:
            scale_sum += tl.sum(given * z, 0)
            shift_sum += tl.sum(given, 0)
    if SUMS:
        to = sums + (row * tl.num_programs(0) + chunk) * 3 * C + c
        tl.store(to, gate_sum, mask=c < C)
        tl.store(to + C, scale_sum, mask=c < C)
        tl.store(to + 2 * C, shift_sum, mask=c < C)


def _fused(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, extra: Tensor | None, scale: Tensor, shift: Tensor,
    eps: float, affine: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(x', h), or (h,) without a branch."""
    given = (x, branch, gate, extra, scale, shift)
    _check(*given, affine=affine)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        outputs: tuple[Tensor, ...] = _GateNorm.apply(*given, eps, affine, dtype)
        return outputs
    return _launch(*given, eps, affine, dtype)


def _check(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, extra: Tensor | None, scale: Tensor, shift: Tensor,
    *, affine: bool,
) -> None:  # fmt: skip
    rows, _, width = x.shape
    for name, t in (("branch", branch), ("extra term", extra)):
        if t is not None and t.shape != x.shape:
            raise ValueError(f"a {name} of shape {tuple(t.shape)} for a stream {tuple(x.shape)}; pass equal shapes")
    vectors = [(width,)] if affine else [(rows, 1, width), (1, 1, width)]
    for name, t in (("gate", gate), ("scale", scale), ("shift", shift)):
        wanted = [(rows, 1, width), (1, 1, width)] if name == "gate" else vectors
        if t is not None and tuple(t.shape) not in wanted:
            raise ValueError(f"a {name} of shape {tuple(t.shape)} for a stream {tuple(x.shape)}; pass one of {wanted}")


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, extra: Tensor | None, scale: Tensor, shift: Tensor,
    eps: float, affine: bool, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    x, (rows, tokens, width) = x.contiguous(), x.shape
    branch, extra = (t if t is None else t.contiguous() for t in (branch, extra))
    gate, scale, shift = None if gate is None else _dense(gate), _dense(scale), _dense(shift)
    joined = x if branch is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=dtype)
    block, tile, warps = _shape(width)
    _forward[(-(-rows * tokens // tile),)](
        x, branch, gate, extra, scale, shift, joined, h, rows * tokens, tokens,
        *map(_row_stride, (gate, scale, shift)), eps, C=width, BLOCK=block, TILE=tile, BRANCH=branch is not None,
        GATE=gate is not None, EXTRA=extra is not None, AFFINE=affine, num_warps=warps,
    )  # fmt: skip
    return (h,) if branch is None else (joined, h)


class _GateNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gate: Tensor | None, extra: Tensor | None, scale: Tensor,
        shift: Tensor, eps: float, affine: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs = _launch(x, branch, gate, extra, scale, shift, eps, affine, dtype)
        # only a gate's own gradient reads the branch again
        kept = branch if gate is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x if branch is None else outputs[0], kept, gate, scale, shift)
        ctx.eps, ctx.affine = eps, affine
        ctx.branch, ctx.extra = (None if t is None else t.dtype for t in (branch, extra))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, branch, gate, scale, shift = ctx.saved_tensors
        x, (rows, tokens, width) = x.contiguous(), x.shape
        dx_out, dh = grads[0].contiguous(), grads[-1].contiguous()
        dx = torch.empty_like(x)
        dbranch = None if gate is None else torch.empty_like(x, dtype=ctx.branch)
        block, tile, warps = _shape(width)
        tiles = max(1, _TOKENS // tile)
        chunks = -(-tokens // (tile * tiles))
        sums = ctx.needs_input_grad[2] or ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        # every program leaves its own sums, added below in a fixed order: the same numbers in every run
        parts = x.new_empty((rows, chunks, 3, width) if sums else 0, dtype=torch.float32)
        gate, scale = None if gate is None else _dense(gate), _dense(scale)
        _backward[(chunks, rows)](
            x, branch, gate, scale, dx_out, dh, dx, dbranch, parts, tokens, _row_stride(gate), _row_stride(scale),
            ctx.eps, C=width, BLOCK=block, TILE=tile, TILES=tiles, BRANCH=ctx.branch is not None,
            GATE=gate is not None, KEPT=branch is not None, AFFINE=ctx.affine, SUMS=sums, num_warps=warps,
        )  # fmt: skip
        if gate is None and ctx.branch is not None:
            dbranch = dx.to(ctx.branch)
        dextra = None if ctx.extra is None else dx.to(ctx.extra)
        if not sums:
            return dx, dbranch, None, dextra, None, None, None, None, None
        dgate, dscale, dshift = parts.sum(1)[:, :, None].unbind(1)  # (R, 1, C)
        vectors = [None if t is None else d.sum_to_size(t.shape).to(t.dtype) for d, t in
                   ((dgate, gate), (dscale, scale), (dshift, shift))]  # fmt: skip
        return dx, dbranch, vectors[0], dextra, vectors[1], vectors[2], None, None, None


def builds(target: int) -> Iterator[Build]:
    """The kernels for the compile gate: the three norms of a block, in the widths of published and built-in models."""
    from scaleweaver.kernels.compile_gate import Build

    forms = {
        "modulate": {"BRANCH": False, "GATE": False, "EXTRA": False, "AFFINE": False},
        "gate, term, affine": {"BRANCH": True, "GATE": True, "EXTRA": True, "AFFINE": True},
        "add, modulate": {"BRANCH": True, "GATE": False, "EXTRA": False, "AFFINE": False},
    }
    strides = dict.fromkeys(("gate_row", "scale_row", "shift_row"), "i32")
    for dtype, width in (("bf16", 768), ("bf16", 2048), ("bf16", 3584), ("fp32", 256), ("fp32", 2048)):
        block, tile, warps = _shape(width)
        for form, flags in forms.items():
            stream, layer = "*fp32", f"*{dtype}"
            pointers = {
                "x": stream, "branch": layer, "gate": stream, "extra": layer, "scale": stream, "shift": stream,
                "x_out": stream, "h_out": layer, "dx_out": stream, "dh": layer, "dx": stream, "dbranch": layer,
                "sums": stream,
            }  # fmt: skip
            types = {**pointers, **strides, "total": "i32", "tokens": "i32", "eps": "fp32"}
            missing = {"branch": flags["BRANCH"], "gate": flags["GATE"], "extra": flags["EXTRA"]}
            shape = {"C": width, "BLOCK": block, "TILE": tile, **{n: None for n, given in missing.items() if not given}}
            shipped = (dtype, width) in (("bf16", 2048), ("bf16", 3584), ("fp32", 256))
            heaviest = width == 3584 and flags["EXTRA"] and target == 90
            name = f"{form} {dtype} C={width}"
            yield Build(
                f"gate_norm forward {name}", _forward.jit, types, {**shape, **flags},
                warps=warps, aligned=frozenset(strides), shipped=shipped,
            )  # fmt: skip
            shape.pop("extra", None)  # the gradient of a term is that of x
            reads = {name: flags[name] for name in ("BRANCH", "GATE", "AFFINE")}
            loops = {"TILES": max(1, _TOKENS // tile), "SUMS": True, "KEPT": flags["GATE"]}
            gone = {} if flags["GATE"] else {"dbranch": None, "branch": None}
            yield Build(
                f"gate_norm backward {name.replace(', term', '')}", _backward.jit, types,
                {**shape, **gone, **reads, **loops}, warps=warps, aligned=frozenset(strides), shipped=shipped,
                sample=heaviest,
            )  # fmt: skip


def _dense(vector: Tensor) -> Tensor:
    """Numbers of a row behind one another; rows may lie apart."""
    return vector if vector.stride(-1) == 1 else vector.contiguous()


def _row_stride(vector: Tensor | None) -> int:
    """How far the vectors of two rows lie apart; 0 where all rows share one."""
    return 0 if vector is None or vector.ndim == 1 or len(vector) == 1 else vector.stride(0)


def _shape(width: int) -> tuple[int, int, int]:
    """The next power of two, how many tokens of it a program holds at once, and the warps for that."""
    block = 1 << (width - 1).bit_length()
    return block, max(1, 2048 // block), 4 if block <= 2048 else 8
