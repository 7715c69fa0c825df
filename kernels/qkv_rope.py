"""From one projection to queries, keys and values: bias, unit length, temperature, rotary positions, cache write.

For a token at position p and a head h, of the projection's parts q, k, v (biases b_q, b_v, temperature log s_h):

    q' = rot_p(min(s_h, 100) (q + b_q) / |q + b_q|)        k' = rot_p(k / |k|)        v' = v + b_v

rot_p turns the interleaved pairs (x0, x1), (x2, x3), ... by the angles of p; |x| is at least 1e-12. Cosine attention
and RoPE of Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431).

In torch this is a chain of float32 passes over q and k. The kernel reads the projection once and writes each result
once, keys and values straight into the cache where it has room. The backward pass recomputes the lengths and keeps
nothing but the projection. With g the gradient of q' turned back, u = (q + b_q) / |q + b_q|:

    d(q + b_q) = s (g - u (u . g)) / |q + b_q|             d log s_h = s sum u . g, 0 where s_h > 100
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaleweaver.kernels.dispatch import Kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

    from scaleweaver.kernels.cast_triton import cast
    from scaleweaver.kernels.compile_gate import Build

Rope = tuple[Tensor, Tensor]

_MAX_LOG_SCALE = math.log(100)
_TILE = 16  # tokens that a program holds at once
_TILES = 8  # tiles that a program of the backward pass adds up


def qkv_rope(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    rope: Rope,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (R, L, 3C), biases (C,), log_scale (H,), rope (cos, sin) of (L, D/2) float32 -> q, k, v (R, H, L, D).

    The results have the dtype of `qkv`. With `into`, two tensors (R, H, L, D) of that dtype and of equal strides, keys
    and values are written there and returned as such; there is no gradient then.
    """
    _check(qkv, log_scale, rope, into)
    if not runs_kernel(qkv):
        return qkv_rope_reference(qkv, q_bias, v_bias, log_scale, rope, into=into)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, q_bias, v_bias, log_scale)):
        q, k, v = _QkvRope.apply(qkv, q_bias, v_bias, log_scale, *rope)
        return q, k, v
    return _launch(qkv, q_bias, v_bias, log_scale, rope, into)


def qkv_rope_reference(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    rope: Rope,
    *,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in torch, lengths and rotation in float32; differentiable without `into`."""
    heads = len(log_scale)
    length = log_scale.float().clamp(max=_MAX_LOG_SCALE).exp()[:, None]  # (H, 1)
    if not torch.is_grad_enabled():
        return _in_place(qkv, q_bias, v_bias, length, rope, into)
    q, k, v = qkv.chunk(3, dim=-1)  # (R, L, C)
    v = (v + v_bias.to(v.dtype)).unflatten(-1, (heads, -1))  # (R, L, H, D)
    q = (q.float() + q_bias.float()).unflatten(-1, (heads, -1))  # (R, L, H, D)
    k = k.float().unflatten(-1, (heads, -1))  # (R, L, H, D)
    q, k = rotate(unit(q, length), rope), rotate(unit(k), rope)  # (R, L, H, D)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))  # (R, H, L, D)
    return (q, k, v) if into is None else (q, into[0].copy_(k), into[1].copy_(v))


def _in_place(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, length: Tensor, rope: Rope, into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same bits without gradients: one float32 copy of queries and keys together, changed where it lies."""
    heads = len(length)
    parts = qkv.unflatten(-1, (3, heads, -1))  # (R, L, 3, H, D)
    pairs = parts[:, :, :2].to(torch.float32, copy=True)  # (R, L, 2, H, D)
    pairs[:, :, 0] += q_bias.float().view(heads, -1)
    lengths = torch.stack((length, torch.ones_like(length)))  # (2, H, 1)
    pairs *= lengths / torch.linalg.vector_norm(pairs, dim=-1, keepdim=True).clamp_min_(1e-12)
    turns = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))  # (R, L, 2, H, D/2)
    turns *= torch.complex(*rope)[:, None, None]
    q, k = (x.transpose(1, 2) for x in pairs.unbind(2))  # (R, H, L, D)
    v = parts[:, :, 2].transpose(1, 2)  # (R, H, L, D)
    bias = v_bias.to(v.dtype).view(heads, 1, -1)  # (H, 1, D)
    if into is None:
        return q.to(v.dtype), k.to(v.dtype), v + bias
    return q.to(v.dtype), into[0].copy_(k), torch.add(v, bias, out=into[1])


def unit(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """x along its last axis scaled to the given length."""
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the interleaved pairs of x (R, L, H, D) float32 by the angles of a (L, D/2) table."""
    turn = torch.complex(*rope)[:, None]  # (L, 1, D/2)
    # one complex product is several times faster than the same in real parts
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)  # (R, L, H, D)


def _check(qkv: Tensor, log_scale: Tensor, rope: Rope, into: tuple[Tensor, Tensor] | None) -> None:
    rows, tokens, width = qkv.shape
    heads, half = len(log_scale), rope[0].shape[-1]
    if width != 6 * heads * half or rope[0].shape != (tokens, half):
        raise ValueError(
            f"a projection of {tokens} tokens and {width} channels for {heads} heads and a RoPE table "
            f"{tuple(rope[0].shape)}: expected 3 * heads * head width channels and a table (tokens, head width / 2)"
        )
    if into is not None and any(t.shape != (rows, heads, tokens, 2 * half) or t.dtype != qkv.dtype for t in into):
        raise ValueError(
            f"room for keys and values of {[tuple(t.shape) for t in into]} and {into[0].dtype}: expected twice "
            f"{(rows, heads, tokens, 2 * half)} and {qkv.dtype}"
        )


@Kernel
def _forward(
    qkv, q_bias, v_bias, log_scale, cos, sin, q_out, k_out, v_out,
    tokens, heads, row_stride, head_stride, token_stride, max_log_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)[:, None]  # (TILE, 1)
    d, pair = tl.arange(0, BLOCK)[None], tl.arange(0, BLOCK // 2)[None]
    ok, ok_pair = (token < tokens) & (d < D), (token < tokens) & (pair < D // 2)
    turn = token * (D // 2) + pair  # (TILE, BLOCK / 2)
    c = tl.load(cos + turn, mask=ok_pair, other=0.0)
    s = tl.load(sin + turn, mask=ok_pair, other=0.0)
    source = qkv + ((row * tokens + token) * 3 * heads + head) * D + d  # (TILE, BLOCK)
    target = row * row_stride + head * head_stride + token * token_stride + d
    for part in tl.static_range(2):
        # to float32 at once: the interpreter's arithmetic on bfloat16 is wrong
        x = tl.load(source + part * heads * D, mask=ok, other=0.0).to(tl.float32)
        length = 1.0
        if part == 0:
            x += tl.load(q_bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)
            length = tl.exp(tl.minimum(tl.load(log_scale + head).to(tl.float32), max_log_scale))
        x *= (length / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12))[:, None]
        even, odd = tl.split(tl.reshape(x, [TILE, BLOCK // 2, 2]))
        x = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [TILE, BLOCK])
        if part == 0:
            q_at = q_out + ((row * heads + head) * tokens + token) * D + d
            tl.store(q_at, cast(x, q_out.dtype.element_ty), mask=ok)
        else:
            tl.store(k_out + target, cast(x, k_out.dtype.element_ty), mask=ok)
    v = tl.load(source + 2 * heads * D, mask=ok, other=0.0).to(tl.float32)
    v += tl.load(v_bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(v_out + target, cast(v, v_out.dtype.element_ty), mask=ok)


@Kernel
def _backward(
    qkv, q_bias, log_scale, cos, sin, dq, dk, dv, dqkv, bias_sums, scale_sums,
    tokens, heads, q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, max_log_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d, pair = tl.arange(0, BLOCK)[None], tl.arange(0, BLOCK // 2)[None]
    bias = tl.load(q_bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)  # (1, BLOCK)
    log = tl.load(log_scale + head).to(tl.float32)
    scale = tl.exp(tl.minimum(log, max_log_scale))
    bias_q, bias_v = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([TILE], tl.float32)
    for tile in range(chunk * TILES, tl.minimum((chunk + 1) * TILES, tl.cdiv(tokens, TILE))):
        token = tile * TILE + tl.arange(0, TILE)[:, None]  # (TILE, 1)
        ok, ok_pair = (token < tokens) & (d < D), (token < tokens) & (pair < D // 2)
        turn = token * (D // 2) + pair  # (TILE, BLOCK / 2)
        c = tl.load(cos + turn, mask=ok_pair, other=0.0)
        s = tl.load(sin + turn, mask=ok_pair, other=0.0)
        source = ((row * tokens + token) * 3 * heads + head) * D + d  # (TILE, BLOCK)
        for part in tl.static_range(2):
            x = tl.load(qkv + source + part * heads * D, mask=ok, other=0.0).to(tl.float32)
            if part == 0:
                x += bias
                given = dq + row * q_row + head * q_head + token * q_token + d
            else:
                given = dk + row * k_row + head * k_head + token * k_token + d
            inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)  # (TILE,)
            u = x * inverse[:, None]
            g = tl.load(given, mask=ok, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(g, [TILE, BLOCK // 2, 2]))
            g = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), [TILE, BLOCK])
            along = tl.sum(u * g, 1)  # (TILE,)
            dx = (g - u * along[:, None]) * inverse[:, None]
            if part == 0:
                dx *= scale
                if SUMS:
                    bias_q += tl.sum(dx, 0)
                    scale_sum += along
            tl.store(dqkv + source + part * heads * D, cast(dx, dqkv.dtype.element_ty), mask=ok)
        g = tl.load(dv + row * v_row + head * v_head + token * v_token + d, mask=ok, other=0.0).to(tl.float32)
        tl.store(dqkv + source + 2 * heads * D, cast(g, dqkv.dtype.element_ty), mask=ok)
        if SUMS:
            bias_v += tl.sum(g, 0)
    if SUMS:
        at = (row * tl.num_programs(0) + chunk) * heads + head
        where = tl.arange(0, BLOCK)
        tl.store(bias_sums + at * 2 * D + where, bias_q, mask=where < D)
        tl.store(bias_sums + (at * 2 + 1) * D + where, bias_v, mask=where < D)
        tl.store(scale_sums + at, tl.where(log > max_log_scale, 0.0, tl.sum(scale_sum, 0) * scale))


def _launch(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, rope: Rope, into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    qkv, (rows, tokens, _) = qkv.contiguous(), qkv.shape
    heads, width = len(log_scale), 2 * rope[0].shape[1]
    q = qkv.new_empty(rows, heads, tokens, width)
    k, v = (torch.empty_like(q), torch.empty_like(q)) if into is None else into
    if k.stride() != v.stride() or k.stride(-1) != 1:
        raise ValueError(f"room for keys and values with strides {k.stride()}, {v.stride()}; pass equal ones, last 1")
    grid = (_tiles(tokens), heads, rows)
    _forward[grid](
        qkv, q_bias, v_bias, log_scale, *(t.contiguous() for t in rope), q, k, v,
        tokens, heads, *k.stride()[:3], _MAX_LOG_SCALE, D=width, BLOCK=_block(width), TILE=_TILE, num_warps=4,
    )  # fmt: skip
    return q, k, v


class _QkvRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, q_bias, v_bias, log_scale, cos, sin)
        return _launch(qkv, q_bias, v_bias, log_scale, (cos, sin), None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_bias, v_bias, log_scale, cos, sin = ctx.saved_tensors
        qkv, (rows, tokens, _) = qkv.contiguous(), qkv.shape
        heads, width = len(log_scale), 2 * cos.shape[1]
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        dqkv = torch.empty_like(qkv)
        chunks = -(-_tiles(tokens) // _TILES)
        sums = any(ctx.needs_input_grad[1:4])
        # every program leaves its own sums, added below in a fixed order: the same numbers in every run
        bias_sums = qkv.new_empty((rows, chunks, heads, 2, width) if sums else 0, dtype=torch.float32)
        scale_sums = qkv.new_empty((rows, chunks, heads) if sums else 0, dtype=torch.float32)
        _backward[(chunks, heads, rows)](
            qkv, q_bias, log_scale, cos.contiguous(), sin.contiguous(), dq, dk, dv, dqkv, bias_sums, scale_sums,
            tokens, heads, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], _MAX_LOG_SCALE,
            D=width, BLOCK=_block(width), TILE=_TILE, TILES=_TILES, SUMS=sums, num_warps=4,
        )  # fmt: skip
        if not sums:
            return dqkv, None, None, None, None, None
        dq_bias, dv_bias = bias_sums.sum((0, 1)).transpose(0, 1).flatten(1)  # (C,) each
        dlog = scale_sums.sum((0, 1))  # (H,)
        return dqkv, dq_bias.to(q_bias.dtype), dv_bias.to(v_bias.dtype), dlog.to(log_scale.dtype), None, None


def builds(target: int) -> Iterator[Build]:
    """The kernels for the compile gate, in the formats and head widths of the published models."""
    from scaleweaver.kernels.compile_gate import Build

    shipped = (("bf16", 128), ("bf16", 96), ("bf16", 64), ("fp32", 64))
    for dtype, width in (*shipped, ("bf16", 32), ("fp16", 128), ("fp32", 128)):
        data, table = f"*{dtype}", "*fp32"
        shape = {"D": width, "BLOCK": _block(width), "TILE": _TILE}
        inputs = {"qkv": data, "q_bias": data, "v_bias": data, "log_scale": table, "cos": table, "sin": table}
        sizes = {"tokens": "i32", "heads": "i32", "max_log_scale": "fp32"}
        strides = dict.fromkeys(("row_stride", "head_stride", "token_stride"), "i32")
        outputs = {"q_out": data, "k_out": data, "v_out": data}
        yield Build(
            f"qkv_rope forward {dtype} D={width}", _forward.jit, {**inputs, **outputs, **sizes, **strides}, shape,
            warps=4, aligned=frozenset(strides), shipped=(dtype, width) in shipped,
        )  # fmt: skip
        strides = {f"{part}_{axis}": "i32" for part in "qkv" for axis in ("row", "head", "token")}
        outputs = {"dq": data, "dk": data, "dv": data, "dqkv": data, "bias_sums": table, "scale_sums": table}
        yield Build(
            f"qkv_rope backward {dtype} D={width}", _backward.jit, {**inputs, **outputs, **sizes, **strides},
            {**shape, "TILES": _TILES, "SUMS": True}, warps=4, aligned=frozenset(strides),
            shipped=(dtype, width) in shipped, sample=(dtype, width, target) == ("bf16", 128, 90),
        )  # fmt: skip


def _tiles(tokens: int) -> int:
    return -(-tokens // _TILE)


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()
