"""From logits to bits, and from bits to the codes that the latent adds up.

Bit j of a token has a logit l_j, its log-odds of being 1, mixed from guidance branches i of weight w_i. With
temperature t, nucleus P and noise e ~ Exp(1), one number for each value of the bit that torch's generators drew:

    m = sum_i w_i l_i / t                    p_1 = 1 / (1 + exp(-m))        p_0 = 1 - p_1
    bit = [m > 0]                            where min(p_0, p_1) <= 1 - P: the rarer value is outside the nucleus
    bit = [p_1 e_0 > p_0 e_1]                elsewhere, which is 1 with probability p_1

and its code is +1/sqrt(d) or -1/sqrt(d) in a unit vector of d bits. Infinity: Scaling Bitwise AutoRegressive Modeling
for High-Resolution Image Synthesis (arXiv 2412.04431). A draw has no gradient, so neither has anything here.

`sample_bits` goes from the logits of all branches to bits in one pass over memory. The noise is an argument because
every picture has a random stream of its own, whatever batch it is drawn in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from scaleweaver.kernels.dispatch import Kernel, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

    from scaleweaver.kernels.cast_triton import cast
    from scaleweaver.kernels.compile_gate import Build

_BITS = 256  # that a program decides


@torch.no_grad()
def sample_bits(
    logits: Tensor,
    noise: Tensor | None,
    *,
    weights: Sequence[float] = (1.0,),
    temperature: float = 1.0,
    top_p: float = 0.0,
) -> Tensor:
    """logits (n B, L, N) of n branches, noise (B, L, N, 2) float32 -> bits (B, L, N) uint8.

    Without noise every bit has its likelier value. top_p of 0 and 1 is off.
    """
    rows, tokens, width = logits.shape
    images, left = divmod(rows, len(weights))
    if left or (noise is not None and noise.shape != (images, tokens, width, 2)):
        raise ValueError(
            f"logits {tuple(logits.shape)}, {len(weights)} weights and noise "
            f"{None if noise is None else tuple(noise.shape)}: expected (weights * B, L, N) and (B, L, N, 2)"
        )
    if not runs_kernel(logits):
        return sample_bits_reference(logits, noise, weights=weights, temperature=temperature, top_p=top_p)
    logits = logits.contiguous()
    bits = torch.empty(images, tokens, width, dtype=torch.uint8, device=logits.device)
    _sample[(-(-bits.numel() // _BITS),)](
        logits, None if noise is None else noise.contiguous(), bits, bits.numel(), tuple(map(float, weights)),
        1 / temperature, 1 - top_p if 0 < top_p < 1 else -1.0,
        BRANCHES=len(weights), NOISE=noise is not None, BLOCK=_BITS, num_warps=4,
    )  # fmt: skip
    return bits


@torch.no_grad()
def sample_bits_reference(
    logits: Tensor,
    noise: Tensor | None,
    *,
    weights: Sequence[float] = (1.0,),
    temperature: float = 1.0,
    top_p: float = 0.0,
) -> Tensor:
    """The formula in torch."""
    m = weighted_sum(logits.float().chunk(len(weights)), weights) / temperature  # (B, L, N)
    likelier = m > 0
    if noise is None:
        return likelier.to(torch.uint8)
    bits = m.sigmoid() * noise[..., 0] > (-m).sigmoid() * noise[..., 1]  # (B, L, N)
    if 0 < top_p < 1:
        bits = torch.where((-m.abs()).sigmoid() <= 1 - top_p, likelier, bits)
    return bits.to(torch.uint8)


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of the parts times their weights; a part of weight 0 is not touched, one of weight 1 is passed as it is."""
    terms = [part if weight == 1 else part * weight for part, weight in zip(parts, weights, strict=True) if weight != 0]
    return sum(terms[1:], start=terms[0])


@torch.no_grad()
def unpack_codes(bits: Tensor, grid: tuple[int, int], patch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits (B, h w, d p p) of the grid (h, w), channels c p p + dy p + dx -> codes (B, d, h p, w p), +-1/sqrt(d)."""
    if not runs_kernel(bits):
        return unpack_codes_reference(bits, grid, patch, dtype)
    h, w = grid
    images, width = len(bits), bits.shape[2]
    codes = torch.empty(images, width // patch**2, h * patch, w * patch, dtype=dtype, device=bits.device)
    _unpack[(-(-codes.numel() // _BITS),)](
        bits.contiguous(), codes, codes.numel(), h, w, 1 / math.sqrt(width // patch**2),
        WIDTH=width, PATCH=patch, BLOCK=_BITS, num_warps=4,
    )  # fmt: skip
    return codes


def unpack_codes_reference(
    bits: Tensor, grid: tuple[int, int], patch: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same in torch."""
    x = F.pixel_shuffle(bits.transpose(1, 2).unflatten(2, grid), patch)  # (B, d, h p, w p)
    return unit_codes(x, x.shape[1], dtype)


def unit_codes(bits: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bits -> +-1/sqrt(width), element by element."""
    return (bits.to(dtype) * 2 - 1) / math.sqrt(width)


@Kernel
def _sample(
    logits, noise, bits, total, weights, inverse_temperature, rare,
    BRANCHES: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < total
    m = tl.zeros([BLOCK], tl.float32)
    for branch in tl.static_range(BRANCHES):
        # to float32 at once: the interpreter's arithmetic on bfloat16 is wrong
        part = tl.load(logits + branch * total + i, mask=ok, other=0.0).to(tl.float32)
        # a branch of weight 0 may hold anything
        m += tl.where(weights[branch] == 0.0, 0.0, part * weights[branch])
    m *= inverse_temperature
    bit = m > 0
    if NOISE:
        pairs = i[:, None] * 2 + tl.arange(0, 2)[None]  # (BLOCK, 2)
        e_zero, e_one = tl.split(tl.load(noise + pairs, mask=ok[:, None], other=1.0))
        p = tl.exp(-tl.abs(m))  # of the rarer value, up to their common sum 1 + p; that of the likelier is 1
        drawn = tl.where(bit, e_zero > p * e_one, p * e_zero > e_one)
        bit = tl.where(p > rare * (1 + p), drawn, bit)
    tl.store(bits + i, bit.to(tl.uint8), mask=ok)


@Kernel
def _unpack(
    bits, codes, total, h, w, amplitude, WIDTH: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # places of (B, d, h p, w p)
    ok = i < total
    x, y = i % (w * PATCH), i // (w * PATCH) % (h * PATCH)
    image, channel = i // (h * w * WIDTH), i // (h * w * PATCH * PATCH) % (WIDTH // (PATCH * PATCH))
    token = (image * h + y // PATCH) * w + x // PATCH
    bit = token * WIDTH + (channel * PATCH + y % PATCH) * PATCH + x % PATCH
    value = tl.load(bits + bit, mask=ok, other=0).to(tl.float32)
    tl.store(codes + i, cast((value * 2.0 - 1.0) * amplitude, codes.dtype.element_ty), mask=ok)


def builds(target: int) -> Iterator[Build]:
    """The kernels for the compile gate: one to four branches, with noise and without, both patch sizes."""
    from scaleweaver.kernels.compile_gate import Build

    for branches, noisy in ((1, False), (1, True), (2, True), (4, True)):
        types: dict[str, str | tuple[str, ...]] = {
            "logits": "*fp32", "noise": "*fp32", "bits": "*u8", "total": "i32", "weights": ("fp32",) * branches,
            "inverse_temperature": "fp32", "rare": "fp32",
        }  # fmt: skip
        constants = {"BRANCHES": branches, "NOISE": noisy, "BLOCK": _BITS, **({} if noisy else {"noise": None})}
        name = f"bit_sampling {branches} branches{'' if noisy else ', likeliest'}"
        yield Build(name, _sample.jit, types, constants, sample=branches == 4 and target == 90)
    for width, patch in ((32, 1), (56, 2)):
        types = {"bits": "*u8", "codes": "*fp32", "total": "i32", "h": "i32", "w": "i32", "amplitude": "fp32"}
        constants = {"WIDTH": width, "PATCH": patch, "BLOCK": _BITS}
        yield Build(f"bit_sampling codes N={width} patch {patch}", _unpack.jit, types, constants)
