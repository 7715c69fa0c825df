"""The parts of gpu.py below a picture: what the card can do at best, and each kernel against torch and against that."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_setup import Bench
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaleweaver.kernels.bit_sampling import sample_bits, sample_bits_reference, unpack_codes, unpack_codes_reference
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.kernels.gate_norm import gate_norm, gate_norm_reference, modulate, modulate_reference
from scaleweaver.kernels.interval_attention import KeySet, interval_attention, interval_attention_reference
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.kernels.measured import Timing, record
from scaleweaver.kernels.qkv_rope import qkv_rope, qkv_rope_reference
from scaleweaver.masks import key_ranges

ROOT = Path(__file__).parents[1]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip


def ceilings(bench: Bench) -> dict[str, Any]:
    """Copy bandwidth, counting what is read and what is written, and the rate of one large matrix product."""
    source = torch.randint(2**30, (bench.sizes.copied // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    copying = bench.milliseconds(lambda: target.copy_(source))
    side = bench.sizes.product
    a, b = bench.random(side, side), bench.random(side, side, seed=1)
    multiplying = bench.milliseconds(lambda: a @ b, 200)
    return {
        "copy_gb_per_s": round(2 * bench.sizes.copied / copying / 1e6, 2),
        "matmul_tflop_per_s": round(2 * side**3 / multiplying / 1e9, 3),
        "matmul": f"{side} x {side} x {side}, {str(bench.sizes.dtype).removeprefix('torch.')}",
    }


def tests(bench: Bench) -> dict[str, Any]:
    """The repository's tests of the kernels and graphs; where there is a GPU they run on it and over more shapes."""
    seconds = min(180.0, bench.left() - 60)
    if seconds < 30:
        bench.need(90)
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x" if not bench.cuda else "-ra",
        "--no-header",
        *bench.sizes.tests,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return {"error": f"not finished after {seconds:.0f} s", "end": output.splitlines()[-20:]}
    lines = done.stdout.splitlines()
    return {
        "passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:],
        "failures": [line[:400] for line in lines if line.startswith(("FAILED", "ERROR"))],
        "end": [] if done.returncode == 0 else lines[-60:], "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def checks(bench: Bench) -> list[dict[str, Any]]:
    """At the sizes of the model: error against float64 beside that of torch, poisoned outputs, repeated runs."""
    return [
        {"kernel": case.name, "tokens": tokens, **bench.attempt(partial(_check, bench, case))}
        for tokens in bench.sizes.checked
        for case in _cases(bench, tokens)
    ]


@dataclass(frozen=True)
class Case:
    """One kernel on inputs of one size: ours, what torch does without it, and the formula in the inputs' precision."""

    name: str
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: list[Tensor]


def _check(bench: Bench, case: Case) -> dict[str, Any]:
    bench.need(5)
    with torch.no_grad():
        truth = _flat(case.formula(*(x.double() if x.is_floating_point() else x for x in case.inputs)))
        plain = _flat(case.torch(*case.inputs))
        with use_kernels(True), _poisoned():
            first, *others = (_flat(case.ours(*case.inputs)) for _ in range(10 if bench.cuda else 2))
    apart, torch_apart = ([_error(a, t) for a, t in zip(found, truth, strict=True)] for found in (first, plain))
    floors = [torch.finfo(x.dtype).eps / 2 if x.is_floating_point() else 0.0 for x in first]
    return {
        "error": max(apart), "torch_error": max(torch_apart),
        "ok": all(a <= 2 * max(b, floor) for a, b, floor in zip(apart, torch_apart, floors, strict=True)),
        "written": all(bool(x.isfinite().all()) for x in first),
        "same_bits": all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)),
    }  # fmt: skip


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference in units of the exact norm."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is nan, or the largest integer, until something is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _cases(bench: Bench, tokens: int, rows: int = 2) -> list[Case]:
    """The kernels of the image pass but those of bits: a draw on an edge may fall to either side, see the tests."""
    heads, width, dtype, draw = bench.sizes.heads, bench.sizes.width, bench.sizes.dtype, bench.random
    f32, head = torch.float32, width // heads
    angles = draw(tokens, head // 2, dtype=f32)
    projection = [draw(rows, tokens, 3 * width), draw(width, seed=1), draw(width, seed=2)]
    projection += [torch.linspace(0.5, 3, heads, device=bench.device), angles.cos(), angles.sin()]
    stream = [draw(rows, tokens, width, dtype=f32), draw(rows, tokens, width, seed=1)]
    vectors = [draw(rows, 1, width, dtype=f32, seed=seed) for seed in (2, 3, 4)]  # gate, scale, shift
    q, k, v = (draw(rows, heads, tokens, head, dtype=f32, seed=seed) for seed in (5, 6, 7))
    attended = [x.to(dtype) for x in (8 * F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    ranges = KeyRanges(((tokens, 0, tokens),))
    return [
        Case(
            "qkv_rope",
            lambda *x: qkv_rope(*x[:4], x[4:]), lambda *x: qkv_rope_reference(*x[:4], x[4:]), _rope_formula, projection,
        ),
        Case(
            "gate_norm",
            partial(gate_norm, dtype=dtype), partial(gate_norm_reference, dtype=dtype), _gate_formula, stream + vectors,
        ),
        Case(
            "modulate",
            partial(modulate, dtype=dtype), partial(modulate_reference, dtype=dtype), _norm_formula,
            [stream[0], *vectors[1:]],
        ),
        Case(
            "interval_attention",
            lambda q, k, v: interval_attention(q, KeySet(k, v, ranges)),
            lambda q, k, v: interval_attention_reference(q, KeySet(k, v, ranges)), _attention_formula, attended,
        ),
    ]  # fmt: skip


def _rope_formula(
    qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(2, (3, len(log_scale), -1)).permute(2, 0, 3, 1, 4)  # (R, H, L, D)
    q, v = (x + bias.view(len(log_scale), 1, -1) for x, bias in ((q, q_bias), (v, v_bias)))

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    return turned(log_scale.exp()[:, None, None] * F.normalize(q, dim=-1)), turned(F.normalize(k, dim=-1)), v


def _norm_formula(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _gate_formula(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return x + gate * branch, _norm_formula(x + gate * branch, scale, shift)


def _attention_formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT  # (R, H, L, L)
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return out.transpose(1, 2)[:, :, None], lse[:, None]  # (R, L, 1, H, D), (R, 1, H, L)


def pointwise(bench: Bench) -> list[dict[str, Any]]:
    """Kernels that only move memory, at the last scale under guidance: GB/s against the copy of the same run."""
    best = bench.ceiling("copy_gb_per_s")
    return [
        {"kernel": name, **bench.attempt(partial(_moves, bench, best, *given))}
        for name, given in _chains(bench).items()
    ]


def _moves(bench: Bench, best: float, ours: Callable[[], Any], plain: Callable[[], Any], moved: int) -> dict[str, Any]:
    bench.need(5)
    with torch.no_grad():
        with use_kernels(True):
            fused = bench.milliseconds(ours)
        eager = bench.milliseconds(plain)
    speed = moved / fused / 1e6
    return {
        "kernel_ms": round(fused, 5), "torch_ms": round(eager, 5), "moved_mib": round(moved / 2**20, 2),
        "gb_per_s": round(speed, 2), "of_copy": round(speed / best, 3),
    }  # fmt: skip


def _chains(bench: Bench) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Ours, torch's, and the bytes that must move: everything read once and written once."""
    step, images, bits = bench.sizes.largest.steps[-1], 1, int(bench.sizes.backbone["bits"])
    cases = {case.name: case for case in _cases(bench, step.n)}

    def chain(name: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
        case = cases[name]
        read = sum(x.nbytes for x in case.inputs)
        with torch.no_grad():
            written = sum(x.nbytes for x in _flat(case.torch(*case.inputs)))
        return partial(case.ours, *case.inputs), partial(case.torch, *case.inputs), read + written

    logits = bench.random(2 * images, step.n, bits, dtype=torch.float32)
    noise = bench.random(images, step.n, bits, 2, dtype=torch.float32).abs() + 1e-3
    settings: dict[str, Any] = {"weights": (3.0, -2.0), "temperature": 0.5, "top_p": 0.97}
    drawn = sample_bits_reference(logits, noise, **settings)
    grid = (step.h, step.w)
    return {
        **{name: chain(name) for name in ("qkv_rope", "gate_norm", "modulate")},
        "sample_bits": (
            partial(sample_bits, logits, noise, **settings),
            partial(sample_bits_reference, logits, noise, **settings),
            logits.nbytes + noise.nbytes + drawn.nbytes,
        ),
        "unpack_codes": (
            partial(unpack_codes, drawn, grid, 1), partial(unpack_codes_reference, drawn, grid, 1), 5 * drawn.nbytes,
        ),
    }  # fmt: skip


def cached_attention(bench: Bench) -> dict[str, Any]:
    """Attention of one scale to all keys so far, for every scale: each backend of torch, and ours.

    What the dispatcher reads (kernels/measured.py) comes out as `entries`.
    """
    rows = [2 * batch for batch in bench.sizes.batches]
    measured = [
        {"rows": each, "scale": step.index, "queries": step.n, "keys": step.stop,
         **bench.attempt(partial(_one_scale, bench, each, step.n, step.stop))}
        for each in rows for step in reversed(bench.sizes.largest.steps)
    ]  # fmt: skip
    capability = tuple(bench.machine.get("capability", (0, 0)))
    words = {"device": bench.machine["device"], "versions": _versions(bench)}
    entries = [
        Timing(
            capability, bench.sizes.width // bench.sizes.heads, str(bench.sizes.dtype).removeprefix("torch."),
            row["rows"], bench.sizes.heads, row["queries"], row["keys"], row["torch_ms"], row["kernel_ms"], **words,
        )
        for row in measured if row.get("torch_ms") and row.get("kernel_ms")
    ]  # fmt: skip
    return {"scales": measured, "entries": [asdict(entry) for entry in entries]}


def _versions(bench: Bench) -> str:
    known = bench.machine["versions"]
    return ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "cudnn") if name in known)


def _one_scale(bench: Bench, rows: int, queries: int, keys: int) -> dict[str, Any]:
    bench.need(8)
    heads, head = bench.sizes.heads, bench.sizes.width // bench.sizes.heads
    q = bench.random(rows, heads, queries, head)
    k, v = (bench.random(rows, heads, keys, head, seed=seed) for seed in (1, 2))
    everything = KeyRanges(((queries, 0, keys),))
    found: dict[str, Any] = {}
    with torch.inference_mode():
        plain = partial(F.scaled_dot_product_attention, q, k, v, scale=1.0)
        found["default_ms"] = bench.attempt(lambda: bench.milliseconds_launched(plain))
        for name, backend in BACKENDS.items() if bench.cuda else ():
            with sdpa_kernel(backend):
                found[f"{name}_ms"] = bench.attempt(lambda: bench.milliseconds_launched(plain))
        with use_kernels(True):
            ours = partial(interval_attention, q, KeySet(k, v, everything))
            found["kernel_ms"] = bench.attempt(lambda: bench.milliseconds_launched(ours))
    errors = {name: value["error"] for name, value in found.items() if isinstance(value, dict) and "error" in value}
    times = {name: value for name, value in found.items() if isinstance(value, float)}
    torch_times = [value for name, value in times.items() if name != "kernel_ms"]
    flop = 4 * rows * heads * queries * keys * head
    best = min(torch_times, default=None)
    return {
        **times, "torch_ms": best, "errors": errors,
        "kernel_tflop_per_s": round(flop / times["kernel_ms"] / 1e9, 3) if "kernel_ms" in times else None,
        "torch_tflop_per_s": round(flop / best / 1e9, 3) if best else None,
    }  # fmt: skip


def training_attention(bench: Bench) -> list[dict[str, Any]]:
    """Attention of all scales at once, forward and with its way back: ours, slices, a dense mask, FlexAttention.

    "block_causal" is training and the condition prefill of scope "causal", "same_scale" that of scope "same".
    """
    rows = []
    for kind in ("block_causal", "same_scale"):
        for backward in (False, True):
            ways = {"kernel": _with_kernel, "slices": _with_slices, "masked": _with_mask, "flex": _with_flex}
            for name, make in ways.items():
                found = bench.attempt(partial(_one_way, bench, make, kind, backward))
                rows.append({"mask": kind, "backward": backward, "way": name, **found})
    return rows


def _one_way(bench: Bench, make: Callable[..., Callable[..., Tensor]], kind: str, backward: bool) -> dict[str, Any]:
    bench.need(60 if make is _with_flex else 10)
    schedule, heads = bench.sizes.largest, bench.sizes.heads
    ranges = key_ranges(schedule.steps, kind)  # type: ignore[arg-type]
    q, k, v = (
        bench.random(1, heads, schedule.length, bench.sizes.width // heads, seed=seed).requires_grad_(backward)
        for seed in (0, 1, 2)
    )
    grad = bench.random(1, heads, schedule.length, bench.sizes.width // heads, seed=3)
    attend = make(bench, ranges)

    def run() -> None:
        out = attend(q, k, v)
        if backward:
            torch.autograd.grad(out, (q, k, v), grad)

    began = time.perf_counter()
    with use_kernels(make is _with_kernel), torch.set_grad_enabled(backward):
        run()
        bench.synchronize()
        first = time.perf_counter() - began
        ms = bench.milliseconds(run)
    pairs = sum(count * (end - start) for count, start, end in ranges.runs)
    flop = (14 if backward else 4) * heads * pairs * (bench.sizes.width // heads)
    return {"ms": round(ms, 4), "first_call_s": round(first, 2), "tflop_per_s": round(flop / ms / 1e9, 3)}


def _with_kernel(bench: Bench, ranges: KeyRanges) -> Callable[..., Tensor]:
    return lambda q, k, v: interval_attention(q, KeySet(k, v, ranges))[0][:, :, 0].transpose(1, 2)


def _with_slices(bench: Bench, ranges: KeyRanges) -> Callable[..., Tensor]:
    """One call of torch's attention a scale, without a mask: exact work, and a dozen launches."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = q.split([count for count, _, _ in ranges.runs], dim=2)
        seen = [(k[:, :, start:end], v[:, :, start:end]) for _, start, end in ranges.runs]
        outs = [F.scaled_dot_product_attention(p, *kv, scale=1.0) for p, kv in zip(parts, seen, strict=True)]
        return torch.cat(outs, dim=2)

    return attend


def _with_mask(bench: Bench, ranges: KeyRanges) -> Callable[..., Tensor]:
    mask = ranges.dense(ranges.rows, bench.device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def _with_flex(bench: Bench, ranges: KeyRanges) -> Callable[..., Tensor]:
    """Compiled for a GPU; elsewhere the eager form, which computes everything and has no way back."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, end = ranges.spans(bench.device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= start[row]) & (key < end[row])

    blocks = create_block_mask(sees, None, None, ranges.rows, ranges.rows, device=bench.device)
    attend = torch.compile(flex_attention, dynamic=False) if bench.cuda else flex_attention
    return lambda q, k, v: attend(q, k, v, block_mask=blocks, scale=1.0)


def write_entries(entries: list[dict[str, Any]], path: Path) -> None:
    """Add the timings to a table that the dispatcher reads."""
    record((Timing(**{**entry, "capability": tuple(entry["capability"])}) for entry in entries), path)
