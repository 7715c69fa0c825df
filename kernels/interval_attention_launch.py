"""Launches of the interval attention kernels: shapes of tiles, tables, and the autograd function. Imports Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scaleweaver.kernels import interval_attention_triton as kernels
from scaleweaver.kernels.compile_gate import TARGETS, Build
from scaleweaver.kernels.key_ranges import KeyRanges

HOPPER = 200 * 1024  # bytes of shared memory a block may ask for, from which the larger tiles fit


@dataclass(frozen=True)
class Tiles:
    """Queries and keys per tile, warps per program, stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of each pass, and how float32 operands are multiplied: "tf32x3" is as exact as float32, on tensor cores
    ("ieee" is not: without them no tile fits the registers).
    """

    forward: Tiles
    queries: Tiles
    keys: Tiles
    precision: str = "tf32x3"


def choose(itemsize: int, shared_memory: int, precision: str = "tf32x3") -> Plan:
    """The plan for bytes per element and shared memory of a block. No configuration here spills at any head width: the
    compile gate has seen each (`python -m scaleweaver.kernels.compile_gate`).
    """
    if itemsize == 4:
        return Plan(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), precision)
    if shared_memory >= HOPPER:
        return Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))
    return Plan(Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2))


def plan(q: Tensor) -> Plan:
    """The plan for this device. In the interpreter, where the number of tiles is what costs, about five of them."""
    if kernels.INTERPRETED:
        side = max(32, 1 << (q.shape[2] // 5).bit_length())
        return Plan(Tiles(side, side, 4, 1), Tiles(2 * side, side, 4, 1), Tiles(side, 2 * side, 4, 1))
    return choose(q.element_size(), _shared_memory(q.device), _precision())


@cache
def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # lacking in torch's stubs


def _precision() -> str:
    """As torch multiplies float32 matrices; the setting got another name in torch 2.9."""
    matmul = torch.backends.cuda.matmul
    fast = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if fast else "tf32x3"


@dataclass(frozen=True)
class Call:
    """What a launch needs beside the tensors that get gradients: ranges and weight as in `KeySet`, places of
    `Nearness.places`.
    """

    ranges: tuple[KeyRanges, ...]
    joint: bool
    weight: Tensor | None
    places: tuple[Tensor, Tensor] | None
    plan: Plan

    @property
    def softmaxes(self) -> int:
        return 1 if self.joint else len(self.ranges)

    def options(self, width: int, tiles: Tiles) -> dict[str, Any]:
        """Constants and options of a kernel that goes over all key sets."""
        weighted, near, second = self.weight is not None, self.places is not None, len(self.ranges) == 2
        constants = _constants(
            width, tiles, self.plan.precision, joint=self.joint, weighted=weighted, near=near, second=second
        )
        return constants | {"num_warps": tiles.warps, "num_stages": tiles.stages}

    def extras(self, unused: Tensor, penalty: Tensor | None) -> tuple[Tensor, ...]:
        """WEIGHT, PENALTY, Q_AT, K_AT; a tensor that no kernel reads stands where there is none."""
        places = self.places or (unused, unused)
        return unused if self.weight is None else self.weight, unused if penalty is None else penalty, *places

    def weight_stride(self) -> int:
        return 0 if self.weight is None or self.weight.shape[0] == 1 else self.weight.stride(0)


def _wide(width: int) -> int:
    """What a head is filled up to: tiles are powers of two."""
    return 1 << (width - 1).bit_length()


def _constants(
    width: int, tiles: Tiles, precision: str, *, joint: bool, weighted: bool, near: bool, second: bool | None = None
) -> dict[str, Any]:
    """What a kernel is compiled for; backward_keys has no SECOND."""
    return {
        "D": width,
        "WIDE": _wide(width),
        "BM": tiles.rows,
        "BN": tiles.keys,
        "JOINT": joint,
        "WEIGHTED": weighted,
        "NEAR": near,
        "PRECISION": precision,
    } | ({} if second is None else {"SECOND": second})


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class IntervalAttention(torch.autograd.Function):
    """q, scale (H,), penalty, keys and values of one or two sets, Call -> out (R, L, S, H, D), lse (R, S, H, L)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        scale: Tensor,
        penalty: Tensor | None,
        k0: Tensor,
        v0: Tensor,
        k1: Tensor | None,
        v1: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        q, k0, v0 = _last_contiguous(q), _last_contiguous(k0), _last_contiguous(v0)
        if k1 is not None and v1 is not None:
            k1, v1 = _last_contiguous(k1), _last_contiguous(v1)
        rows, heads, tokens, width = q.shape
        out = q.new_empty(rows, tokens, call.softmaxes, heads, width)
        lse = q.new_empty(rows, call.softmaxes, heads, tokens, dtype=torch.float32)
        tiles = call.plan.forward
        grid = (-(-tokens // tiles.rows), rows * heads)
        kernels.forward[grid](
            q, scale, out, lse, *_both(call, q.device, tiles, k0, v0, k1, v1), *call.extras(scale, penalty),
            *_strides(q, k0, v0, k1, v1), call.weight_stride(), heads, tokens, *_counts(k0, k1),
            **call.options(width, tiles),
        )  # fmt: skip
        ctx.save_for_backward(q, scale, penalty, k0, v0, k1, v1, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, scale, penalty, k0, v0, k1, v1, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        rows, heads, tokens, width = q.shape
        d_out, delta = d_out.contiguous(), torch.empty_like(lse)
        tiles = call.plan.queries
        options = call.options(width, tiles)
        kernels.backward_delta[(-(-tokens // tiles.rows), rows * call.softmaxes * heads)](
            out, d_out, d_lse.contiguous(), delta, heads, tokens, call.softmaxes,
            D=width, WIDE=_wide(width), BM=tiles.rows, num_warps=tiles.warps, num_stages=1,
        )  # fmt: skip
        dq = d_scale = d_penalty = None
        if any(ctx.needs_input_grad[:3]):
            grid = (-(-tokens // tiles.rows), rows * heads)
            dq = q.new_empty(rows, tokens, heads, width)
            sums = q.new_empty(2, rows, heads, grid[0], dtype=torch.float32)  # of scale and penalty, per program
            kernels.backward_queries[grid](
                q, scale, d_out, lse, delta, *_both(call, q.device, tiles, k0, v0, k1, v1),
                *call.extras(scale, penalty), dq, sums[0], sums[1], *_strides(q, k0, v0, k1, v1),
                call.weight_stride(), heads, tokens, *_counts(k0, k1), **options,
            )  # fmt: skip
            dq = dq.transpose(1, 2)  # (R, H, L, D)
            d_scale = sums[0].sum((0, 2))  # (H,)
            d_penalty = None if penalty is None else sums[1].sum().view_as(penalty)
        grads: list[Tensor | None] = []
        for index, (k, v) in enumerate(((k0, v0), (k1, v1))):
            needed = any(ctx.needs_input_grad[3 + 2 * index : 5 + 2 * index])
            grads += _key_gradients(call, index, q, scale, penalty, k, v, d_out, lse, delta) if needed else (None, None)
        return dq, d_scale, d_penalty, *grads, None


def _key_gradients(
    call: Call,
    index: int,
    q: Tensor,
    scale: Tensor,
    penalty: Tensor | None,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of key set `index`: two tensors (Rk, H, K, D)."""
    rows, heads, tokens, width = q.shape
    tiles, ranges = call.plan.keys, call.ranges[index]
    key_rows, keys = k.shape[0], k.shape[2]
    dk, dv = q.new_empty(2, key_rows, heads, keys, width).unbind()
    last = index == len(call.ranges) - 1  # weight and places belong to it
    weighted, near = last and call.weight is not None, last and call.places is not None
    constants = _constants(width, tiles, call.plan.precision, joint=call.joint, weighted=weighted, near=near)
    kernels.backward_keys[(-(-keys // tiles.keys), key_rows * heads)](
        q, scale, d_out, lse, delta, k, v, ranges.spans(q.device),
        ranges.tiles_of_queries(keys, tiles.rows, tiles.keys, q.device), *call.extras(scale, penalty), dk, dv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], call.weight_stride(),
        heads, tokens, rows, key_rows, keys, min(index, call.softmaxes - 1), call.softmaxes,
        **constants, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dk, dv


def _both(call: Call, device: torch.device, tiles: Tiles, *tensors: Tensor | None) -> list[Any]:
    """K, V, SPAN, VISIT of both sets; the first stands for a second that is not there."""
    found: list[Any] = []
    for index, ranges in enumerate((call.ranges * 2)[:2]):
        present = 2 * index if index < len(call.ranges) else 0
        visit = ranges.tiles_of_keys(tiles.rows, tiles.keys, device)
        found += [*tensors[present : present + 2], ranges.spans(device), visit]
    return found


def _strides(q: Tensor, k0: Tensor, v0: Tensor, k1: Tensor | None, v1: Tensor | None) -> list[int]:
    second = (k0 if k1 is None else k1, v0 if v1 is None else v1)
    return [stride for x in (q, k0, v0, *second) for stride in x.stride()[:3]]


def _counts(k0: Tensor, k1: Tensor | None) -> tuple[int, ...]:
    """Rows and number of keys of both sets."""
    second = k0 if k1 is None else k1
    return k0.shape[0], k0.shape[2], second.shape[0], second.shape[2]


# what may be launched: second key set, joint, weighted, near. The pipeline and the recipes launch the first four.
_FORMS = {
    "": (False, False, False, False),
    "near": (False, False, False, True),
    "both": (True, False, False, False),
    "both near": (True, False, False, True),
    "separate": (True, False, True, True),
    "joint": (True, True, True, True),
}
_LAUNCHED = tuple(_FORMS)[:4]
# of these, heads of the published 2B and 8B models, of the 125M (a penalty is the built-in model's alone), and of the
# built-in one, which learns in float32 and may draw in bfloat16
_SHIPPED = {
    ("bf16", 128): _LAUNCHED,
    ("bf16", 96): ("", "both"),
    ("fp32", 64): _LAUNCHED,
    ("bf16", 64): _LAUNCHED,
}


def builds(target: int) -> Iterator[Build]:
    """What the plans launch: one key set or two, with and without a penalty, and two with all that they may carry."""
    for dtype, itemsize, widths in (("bf16", 2, (128, 96, 64, 32)), ("fp32", 4, (64, 32)), ("fp16", 2, (128, 64))):
        chosen = choose(itemsize, TARGETS[target])
        for width in widths:
            for form in _FORMS:
                for name in ("forward", "backward_queries", "backward_keys"):
                    yield _build(name, dtype, width, form, chosen, target)
            yield Build(
                name=f"interval backward_delta {dtype} D={width}",
                kernel=kernels.backward_delta,
                types={argument: _type(argument, dtype) for argument in kernels.backward_delta.arg_names},
                constants={"D": width, "WIDE": _wide(width), "BM": chosen.queries.rows},
                warps=chosen.queries.warps,
                stages=1,
                shipped=_ships("backward_delta", dtype, width, ""),
            )


def _ships(name: str, dtype: str, width: int, form: str) -> bool:
    return form in _SHIPPED.get((dtype, width), ()) and (name == "forward" or (dtype, width) != ("bf16", 64))


def _build(name: str, dtype: str, width: int, form: str, chosen: Plan, target: int) -> Build:
    kernel = getattr(kernels, name)
    tiles = {"forward": chosen.forward, "backward_queries": chosen.queries, "backward_keys": chosen.keys}[name]
    two, joint, weighted, near = _FORMS[form]
    second = None if name == "backward_keys" else two
    strides = {argument for argument in kernel.arg_names if argument.endswith(("_row", "_head", "_token"))}
    return Build(
        name=" ".join(filter(None, ("interval", name, form, dtype, f"D={width}"))),
        kernel=kernel,
        types={argument: _type(argument, dtype) for argument in kernel.arg_names},
        constants=_constants(width, tiles, chosen.precision, joint=joint, weighted=weighted, near=near, second=second),
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=frozenset(strides - {"weight_row"}),
        shipped=_ships(name, dtype, width, form),
        sample=form == "separate" and (dtype, width) == ("bf16", 128) and (target != 80 or name == "forward"),
    )


def _type(argument: str, dtype: str) -> str:
    if argument.startswith(("SPAN", "VISIT")):
        return "*i32"
    if argument in ("Q", "OUT", "D_OUT", "DQ", "DK", "DV") or (argument[0] in "KV" and argument != "K_AT"):
        return f"*{dtype}"
    return "*fp32" if argument.isupper() else "i32"
