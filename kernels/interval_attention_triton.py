"""The Triton kernels of `interval_attention`: one forward pass, and three passes backward. Imports Triton.

Each program owns a tile of rows, of queries or of keys, and walks over the tiles of the other side that any of them
sees; inside the part that all of them see no mask is applied. Nothing is added up by atomics, so the same inputs give
the same bits. Scores are kept in base 2: exp2 is what the hardware has.

Every value is cast to float32 right after it is loaded, except the operands of matrix products, and back by `cast`: the
interpreter computes with bfloat16 wrongly, and says nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleweaver.kernels.cast_triton import INTERPRETED, cast

_UPCAST = tl.constexpr(INTERPRETED)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b, precision: tl.constexpr):
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=precision)


@triton.jit
def _load_rows(base, rows, stride, count, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a matrix (count, D) as (len(rows), WIDE), zero beyond its edges."""
    column = tl.arange(0, WIDE)
    inside = rows[:, None] < count
    if WIDE > D:
        inside = inside & (column[None, :] < D)
    return tl.load(base + rows[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, rows, stride, count, value, D: tl.constexpr, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)
    inside = rows[:, None] < count
    if WIDE > D:
        inside = inside & (column[None, :] < D)
    tl.store(base + rows[:, None] * stride + column[None, :], cast(value, base.dtype.element_ty), mask=inside)


@triton.jit
def _squared_distance(Q_AT, K_AT, rows, keys, row_count, key_count):
    """rows and keys broadcast against each other; Q_AT (L, 4) holds y h, x w, h, w of a query, K_AT (K, 2) y, x."""
    seen = rows < row_count
    y = tl.load(Q_AT + rows * 4, mask=seen, other=0.0)
    x = tl.load(Q_AT + rows * 4 + 1, mask=seen, other=0.0)
    h = tl.load(Q_AT + rows * 4 + 2, mask=seen, other=0.0)
    w = tl.load(Q_AT + rows * 4 + 3, mask=seen, other=0.0)
    dy = y - h * tl.load(K_AT + keys * 2, mask=keys < key_count, other=0.0)
    dx = x - w * tl.load(K_AT + keys * 2 + 1, mask=keys < key_count, other=0.0)
    return dy * dy + dx * dx


@triton.jit
def _log2_weight(weight):
    return tl.where(weight > 0, tl.log2(tl.maximum(weight, 1e-38)), float("-inf"))


@triton.jit
def _load_lse2(LSE, rows, count):
    """In base 2; rows that see nothing get inf, so that exp2(score - lse) is 0 and not nan."""
    lse = tl.load(LSE + rows, mask=rows < count, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2E)


@triton.jit
def _read(
    q, K, V, SPAN, VISIT, PENALTY, Q_AT, K_AT, scale, weight,
    rows, tile, tokens, k_token, v_token, keys, acc, total, peak,
    D: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    WEIGHTED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pass over the keys that a tile of queries sees, with a running maximum."""
    start = tl.load(SPAN + rows, mask=rows < tokens, other=0)
    end = tl.load(SPAN + tokens + rows, mask=rows < tokens, other=0)
    first, stop = tl.load(VISIT + tile * 4), tl.load(VISIT + tile * 4 + 1)
    free, bound = tl.load(VISIT + tile * 4 + 2), tl.load(VISIT + tile * 4 + 3)
    if WEIGHTED:
        bias = _log2_weight(weight)
        stop = tl.where(tl.max(weight, 0) > 0, stop, first)
    if NEAR:
        penalty = tl.load(PENALTY) * _LOG2E
    for j in range(first, stop):
        at = j * BN + tl.arange(0, BN)
        k = _load_rows(K, at, k_token, keys, D, WIDE)
        s = _dot(q, tl.trans(k), PRECISION) * scale  # (BM, BN)
        if NEAR:
            s -= penalty * _squared_distance(Q_AT, K_AT, rows[:, None], at[None, :], tokens, keys)
        if WEIGHTED:
            s += bias[:, None]
        if (j < free) | (j >= bound):
            s = tl.where((at[None, :] >= start[:, None]) & (at[None, :] < end[:, None]), s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(peak - safe)
        v = _load_rows(V, at, v_token, keys, D, WIDE)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + _dot(cast(p, v.dtype), v, PRECISION)
        peak = top
    return acc, total, peak


@triton.jit
def _write(
    OUT, LSE, acc, total, peak, weight, row, head, rows, segment, segments, heads, tokens,
    D: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    empty = total == 0
    some = tl.where(empty, 1.0, total)
    out = acc / some[:, None]
    if SCALED:
        out = out * weight[:, None]
    base = OUT + ((row * tokens * segments + segment) * heads + head) * D
    _store_rows(base, rows, segments * heads * D, tokens, out, D, WIDE)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(some)) * _LN2)
    tl.store(LSE + ((row * segments + segment) * heads + head) * tokens + rows, lse, mask=rows < tokens)


@triton.jit
def forward(
    Q, SCALE, OUT, LSE, K0, V0, SPAN0, VISIT0, K1, V1, SPAN1, VISIT1, WEIGHT, PENALTY, Q_AT, K_AT,
    q_row, q_head, q_token, k0_row, k0_head, k0_token, v0_row, v0_head, v0_token,
    k1_row, k1_head, k1_token, v1_row, v1_head, v1_token, weight_row,
    heads, tokens, rows0, keys0, rows1, keys1,
    D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SECOND: tl.constexpr,
    JOINT: tl.constexpr, WEIGHTED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, R H). OUT (R, L, S, H, D), LSE (R, S, H, L), both contiguous."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see the most keys: begin with them
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    q = _load_rows(Q + row * q_row + head * q_head, rows, q_token, tokens, D, WIDE)
    scale = tl.load(SCALE + head) * _LOG2E
    weight = tl.full([BM], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + row * weight_row + rows, mask=rows < tokens, other=0.0)
    acc = tl.zeros([BM, WIDE], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    k = K0 + (row % rows0) * k0_row + head * k0_head
    v = V0 + (row % rows0) * v0_row + head * v0_head
    acc, total, peak = _read(
        q, k, v, SPAN0, VISIT0, PENALTY, Q_AT, K_AT, scale, weight, rows, tile, tokens, k0_token, v0_token, keys0,
        acc, total, peak, D, WIDE, BN, WEIGHTED and not SECOND, NEAR and not SECOND, PRECISION,
    )  # fmt: skip
    if SECOND:
        if not JOINT:
            _write(OUT, LSE, acc, total, peak, weight, row, head, rows, 0, 2, heads, tokens, D, WIDE, False)
            acc = tl.zeros([BM, WIDE], tl.float32)
            total = tl.zeros([BM], tl.float32)
            peak = tl.full([BM], float("-inf"), tl.float32)
        k = K1 + (row % rows1) * k1_row + head * k1_head
        v = V1 + (row % rows1) * v1_row + head * v1_head
        acc, total, peak = _read(
            q, k, v, SPAN1, VISIT1, PENALTY, Q_AT, K_AT, scale, weight, rows, tile, tokens, k1_token, v1_token, keys1,
            acc, total, peak, D, WIDE, BN, WEIGHTED, NEAR, PRECISION,
        )  # fmt: skip
    if SECOND and not JOINT:
        _write(OUT, LSE, acc, total, peak, weight, row, head, rows, 1, 2, heads, tokens, D, WIDE, WEIGHTED)
    else:
        _write(
            OUT, LSE, acc, total, peak, weight, row, head, rows, 0, 1, heads, tokens, D, WIDE, WEIGHTED and not JOINT
        )


@triton.jit
def backward_delta(
    OUT, D_OUT, D_LSE, DELTA, heads, tokens, segments, D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr
):
    """delta = out . d_out - d_lse, grid (tiles of queries, R S H)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    line = tl.program_id(1).to(tl.int64)  # of LSE (R, S, H, L)
    head, segment = line % heads, (line // heads) % segments
    base = ((line // (heads * segments) * tokens * segments + segment) * heads + head) * D
    out = _load_rows(OUT + base, rows, segments * heads * D, tokens, D, WIDE).to(tl.float32)
    d_out = _load_rows(D_OUT + base, rows, segments * heads * D, tokens, D, WIDE).to(tl.float32)
    d_lse = tl.load(D_LSE + line * tokens + rows, mask=rows < tokens, other=0.0)
    tl.store(DELTA + line * tokens + rows, tl.sum(out * d_out, 1) - d_lse, mask=rows < tokens)


@triton.jit
def backward_keys(
    Q, SCALE, D_OUT, LSE, DELTA, K, V, SPAN, VISIT, WEIGHT, PENALTY, Q_AT, K_AT, DK, DV,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, weight_row,
    heads, tokens, rows_of_queries, rows_of_keys, keys, segment, segments,
    D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINT: tl.constexpr, WEIGHTED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one key set, DK and DV (Rk, H, K, D) contiguous; grid (tiles of keys, Rk H).

    Keys that several rows of queries share sum up over all of them here, in a fixed order.
    """
    tile = tl.program_id(0)
    key_row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    at = tile * BN + tl.arange(0, BN)
    k = _load_rows(K + key_row * k_row + head * k_head, at, k_token, keys, D, WIDE)
    v = _load_rows(V + key_row * v_row + head * v_head, at, v_token, keys, D, WIDE)
    length = tl.load(SCALE + head)
    dk = tl.zeros([BN, WIDE], tl.float32)
    dv = tl.zeros([BN, WIDE], tl.float32)
    first, stop = tl.load(VISIT + tile * 4), tl.load(VISIT + tile * 4 + 1)
    free, bound = tl.load(VISIT + tile * 4 + 2), tl.load(VISIT + tile * 4 + 3)
    if NEAR:
        penalty = tl.load(PENALTY) * _LOG2E
    for turn in range(0, rows_of_queries // rows_of_keys):
        row = key_row + turn * rows_of_keys
        line = ((row * segments + segment) * heads + head) * tokens
        d_out_of_row = D_OUT + ((row * tokens * segments + segment) * heads + head) * D
        for i in range(first, stop):
            rows = i * BM + tl.arange(0, BM)
            q = _load_rows(Q + row * q_row + head * q_head, rows, q_token, tokens, D, WIDE)
            s = _dot(k, tl.trans(q), PRECISION) * (length * _LOG2E)  # (BN, BM)
            if NEAR:
                s -= penalty * _squared_distance(Q_AT, K_AT, rows[None, :], at[:, None], tokens, keys)
            if WEIGHTED:
                weight = tl.load(WEIGHT + row * weight_row + rows, mask=rows < tokens, other=0.0)
                s += _log2_weight(weight)[None, :]
            p = tl.exp2(s - _load_lse2(LSE + line, rows, tokens)[None, :])
            if (i < free) | (i >= bound):
                start = tl.load(SPAN + rows, mask=rows < tokens, other=0)
                end = tl.load(SPAN + tokens + rows, mask=rows < tokens, other=0)
                p = tl.where((at[:, None] >= start[None, :]) & (at[:, None] < end[None, :]), p, 0.0)
            d_out = _load_rows(d_out_of_row, rows, segments * heads * D, tokens, D, WIDE)
            dp = _dot(v, tl.trans(d_out), PRECISION)  # (BN, BM)
            if WEIGHTED and not JOINT:
                dp *= weight[None, :]
                dv += _dot(cast(p * weight[None, :], d_out.dtype), d_out, PRECISION)
            else:
                dv += _dot(cast(p, d_out.dtype), d_out, PRECISION)
            ds = p * (dp - tl.load(DELTA + line + rows, mask=rows < tokens, other=0.0)[None, :])
            dk += _dot(cast(ds, q.dtype), q, PRECISION)
    base = (key_row * heads + head) * keys * D
    _store_rows(DK + base, at, D, keys, dk * length, D, WIDE)
    _store_rows(DV + base, at, D, keys, dv, D, WIDE)


@triton.jit
def _read_backward(
    q, D_OUT, LSE, DELTA, K, V, SPAN, VISIT, PENALTY, Q_AT, K_AT, scale, weight, rows, tile, tokens, segments, heads,
    k_token, v_token, keys, dq, d_penalty,
    D: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d_out = _load_rows(D_OUT, rows, segments * heads * D, tokens, D, WIDE)
    lse = _load_lse2(LSE, rows, tokens)
    delta = tl.load(DELTA + rows, mask=rows < tokens, other=0.0)
    start = tl.load(SPAN + rows, mask=rows < tokens, other=0)
    end = tl.load(SPAN + tokens + rows, mask=rows < tokens, other=0)
    first, stop = tl.load(VISIT + tile * 4), tl.load(VISIT + tile * 4 + 1)
    free, bound = tl.load(VISIT + tile * 4 + 2), tl.load(VISIT + tile * 4 + 3)
    if WEIGHTED:
        bias = _log2_weight(weight)
    if NEAR:
        penalty = tl.load(PENALTY) * _LOG2E
    for j in range(first, stop):
        at = j * BN + tl.arange(0, BN)
        k = _load_rows(K, at, k_token, keys, D, WIDE)
        s = _dot(q, tl.trans(k), PRECISION) * scale  # (BM, BN)
        if NEAR:
            distance = _squared_distance(Q_AT, K_AT, rows[:, None], at[None, :], tokens, keys)
            s -= penalty * distance
        if WEIGHTED:
            s += bias[:, None]
        p = tl.exp2(s - lse[:, None])
        if (j < free) | (j >= bound):
            p = tl.where((at[None, :] >= start[:, None]) & (at[None, :] < end[:, None]), p, 0.0)
        v = _load_rows(V, at, v_token, keys, D, WIDE)
        dp = _dot(d_out, tl.trans(v), PRECISION)  # (BM, BN)
        if SCALED:
            dp *= weight[:, None]
        ds = p * (dp - delta[:, None])
        if NEAR:
            d_penalty -= tl.sum(ds * distance, 1)
        dq += _dot(cast(ds, k.dtype), k, PRECISION)
    return dq, d_penalty


@triton.jit
def backward_queries(
    Q, SCALE, D_OUT, LSE, DELTA, K0, V0, SPAN0, VISIT0, K1, V1, SPAN1, VISIT1, WEIGHT, PENALTY, Q_AT, K_AT,
    DQ, D_SCALE, D_PENALTY,
    q_row, q_head, q_token, k0_row, k0_head, k0_token, v0_row, v0_head, v0_token,
    k1_row, k1_head, k1_token, v1_row, v1_head, v1_token, weight_row,
    heads, tokens, rows0, keys0, rows1, keys1,
    D: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SECOND: tl.constexpr,
    JOINT: tl.constexpr, WEIGHTED: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ (R, L, H, D) contiguous; D_SCALE and D_PENALTY (R, H, tiles) still to be summed. Grid as of `forward`."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    q = _load_rows(Q + row * q_row + head * q_head, rows, q_token, tokens, D, WIDE)
    length = tl.load(SCALE + head)
    weight = tl.full([BM], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + row * weight_row + rows, mask=rows < tokens, other=0.0)
    dq = tl.zeros([BM, WIDE], tl.float32)
    d_penalty = tl.zeros([BM], tl.float32)
    SEGMENTS: tl.constexpr = 2 if SECOND and not JOINT else 1
    d_out = D_OUT + (row * tokens * SEGMENTS * heads + head) * D
    line = (row * SEGMENTS * heads + head) * tokens
    k = K0 + (row % rows0) * k0_row + head * k0_head
    v = V0 + (row % rows0) * v0_row + head * v0_head
    dq, d_penalty = _read_backward(
        q, d_out, LSE + line, DELTA + line, k, v, SPAN0, VISIT0, PENALTY, Q_AT, K_AT, length * _LOG2E, weight,
        rows, tile, tokens, SEGMENTS, heads, k0_token, v0_token, keys0, dq, d_penalty, D, WIDE, BN,
        WEIGHTED and not SECOND, WEIGHTED and not SECOND, NEAR and not SECOND, PRECISION,
    )  # fmt: skip
    if SECOND:
        if not JOINT:
            d_out += heads * D
            line += heads * tokens
        k = K1 + (row % rows1) * k1_row + head * k1_head
        v = V1 + (row % rows1) * v1_row + head * v1_head
        dq, d_penalty = _read_backward(
            q, d_out, LSE + line, DELTA + line, k, v, SPAN1, VISIT1, PENALTY, Q_AT, K_AT, length * _LOG2E, weight,
            rows, tile, tokens, SEGMENTS, heads, k1_token, v1_token, keys1, dq, d_penalty, D, WIDE, BN,
            WEIGHTED and not JOINT, WEIGHTED, NEAR, PRECISION,
        )  # fmt: skip
    # logits are scale q.k, so the scale gets sum q . (dq / scale)
    place = tl.program_id(1) * tl.num_programs(0) + tile
    tl.store(D_SCALE + place, tl.sum(tl.sum(q.to(tl.float32) * dq, 1), 0))
    if NEAR:
        tl.store(D_PENALTY + place, tl.sum(d_penalty, 0))
    _store_rows(DQ + (row * tokens * heads + head) * D, rows, heads * D, tokens, dq * length, D, WIDE)
