"""The interval attention kernels against the formula in float64: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import BITS, PATCH, tiny_backbone, tiny_schedule, tiny_text
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.adapters import add_control
from scaleweaver.cache import KVCache
from scaleweaver.kernels.attention import attend
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.kernels.interval_attention import (
    KeySet,
    Nearness,
    attend_ranges,
    interval_attention,
    interval_attention_reference,
    splits,
)
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.masks import key_ranges
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig, encode
from scaleweaver.reference import ReferenceInjector, nearness
from scaleweaver.schedule import infinity_schedule
from scaleweaver.tokenizers.target import ResidualTarget

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: minutes in the interpreter")
# errors that count as none: about one rounding of the result, and more where one number sums up all pairs
NOTHING = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NOTHING_OF_SUMS = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMS = ["plain", "near", "separate", "joint", "separate_near", "joint_near"]


def scales(tokens: int) -> list[int]:
    """Scales 1, 4, 9, ... with what is left over at the end."""
    counts: list[int] = []
    while sum(counts) + (len(counts) + 1) ** 2 <= tokens:
        counts.append((len(counts) + 1) ** 2)
    rest = tokens - sum(counts)
    return counts + [rest] * (rest > 0)


def causal(counts: list[int], history: int = 0) -> KeyRanges:
    return KeyRanges(tuple((n, 0, history + sum(counts[: i + 1])) for i, n in enumerate(counts)))


def windows(counts: list[int], scales_seen: int = 1) -> KeyRanges:
    """The newest `scales_seen` scales: 1 is the row's own, 2 the previous one too, as in HMAR."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return KeyRanges(tuple((n, sum(counts[: max(0, i + 1 - scales_seen)]), ends[i]) for i, n in enumerate(counts)))


def case(
    form: str, tokens: int, width: int, dtype: torch.dtype, *, rows: int = 2, key_rows: int = 1, heads: int = 2
) -> tuple[list[Tensor], KeySet, KeySet | None]:
    """Leaves (q, scale, k0, v0, k1, v1, penalty), those that are there, and key sets that hold them."""
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    counts = scales(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def keys(rows: int, count: int) -> list[Tensor]:
        k, v = draw(rows, heads, count, width), draw(rows, heads, count, width)
        return [(k / k.norm(dim=-1, keepdim=True)).to(DEVICE, dtype), v.to(DEVICE, dtype)]

    q = draw(rows, heads, tokens, width)
    leaves = [(q / q.norm(dim=-1, keepdim=True)).to(DEVICE, dtype), torch.linspace(3, 8, heads, device=DEVICE)]
    near = weight = None
    if form.endswith("near"):
        at, keys_at = torch.rand(tokens, 2, generator=generator), torch.rand(tokens, 2, generator=generator)
        size = torch.cat([torch.full((n, 2), n**0.5) for n in counts])
        near = Nearness(torch.tensor(0.3, device=DEVICE), at.to(DEVICE), size.to(DEVICE), keys_at.to(DEVICE))
        weight = torch.rand(rows, tokens, generator=generator).to(DEVICE)
        weight[:, : tokens // 3] = 0
    two = not form.startswith(("plain", "near"))
    history = 7
    own = [*keys(rows if two else key_rows, tokens + history)]
    leaves += own
    first = KeySet(own[0], own[1], causal(counts, history))
    second = None
    if two:
        leaves += keys(key_rows, tokens)
        second = KeySet(leaves[-2], leaves[-1], windows(counts), weight, near)
    elif near is not None:
        first = KeySet(own[0][:, :, :tokens], own[1][:, :, :tokens], windows(counts, 2), weight, near)
        leaves[2:] = [first.k, first.v]
    if near is not None:
        leaves.append(near.penalty)
    return leaves, first, second


def formula(q: Tensor, scale: Tensor, first: KeySet, second: KeySet | None, joint: bool) -> tuple[Tensor, Tensor]:
    """Every step in the precision of q."""
    parts = []
    for keys in (first, second):
        if keys is None:
            continue
        row = torch.arange(len(q), device=q.device) % len(keys.k)
        s = torch.einsum("rhld,rhkd->rhlk", q, keys.k[row]) * scale.to(q.dtype)[:, None, None]
        runs = keys.ranges.runs
        start, end = (torch.tensor([run[i] for run in runs for _ in range(run[0])], device=q.device) for i in (1, 2))
        index = torch.arange(s.shape[-1], device=q.device)
        seen = ((index >= start[:, None]) & (index < end[:, None])).expand_as(s)
        if keys.nearness is not None:
            s = s - (keys.nearness.penalty * keys.nearness.squared_distances()).to(q.dtype)
        weight = torch.ones_like(q[:, 0, :, 0]) if keys.weight is None else keys.weight.to(q.dtype).expand(len(q), -1)
        seen = seen & (weight > 0)[:, None, :, None]
        s = s + torch.where(weight > 0, weight, 1).log()[:, None, :, None]
        parts.append((s, seen, keys.v[row], weight))
    if joint:
        s, seen = (torch.cat([part[i] for part in parts], -1) for i in (0, 1))
        parts = [(s, seen, torch.cat([part[2] for part in parts], 2), torch.ones_like(parts[0][3]))]
    outs, lses = [], []
    for s, seen, v, weight in parts:
        some = seen.any(-1, keepdim=True)
        s = s.masked_fill(~seen & some, -torch.inf)
        outs.append((s.softmax(-1) @ v) * some * weight[:, None, :, None])
        lses.append(s.logsumexp(-1).masked_fill(~some[..., 0], -torch.inf))
    return torch.stack(outs, 1).permute(0, 3, 1, 2, 4), torch.stack(lses, 1)


def in_precision(leaves: list[Tensor], first: KeySet, second: KeySet | None, dtype: torch.dtype | None) -> tuple:
    """The same case with fresh leaves, all of one dtype if given."""
    fresh = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    near = (second or first).nearness
    if near is not None:
        places = [part.to(dtype or part.dtype) for part in (near.at, near.size, near.keys_at)]
        near = Nearness(fresh[-1], *places)
    first = replace(first, k=fresh[2], v=fresh[3], nearness=None if second else near)
    if second is not None:
        second = replace(second, k=fresh[4], v=fresh[5], nearness=near)
    return fresh, first, second


def run(attention, leaves: list[Tensor], first: KeySet, second: KeySet | None, dtype: torch.dtype | None, joint: bool):
    """out, lse and the gradients of all leaves, for one and the same cotangent."""
    fresh, first, second = in_precision(leaves, first, second, dtype)
    out, lse = attention(fresh[0], fresh[1], first, second, joint)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=generator).to(x).masked_fill(~x.isfinite(), 0) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), fresh, pulls)]


def kernel(q: Tensor, scale: Tensor, first: KeySet, second: KeySet | None, joint: bool) -> tuple[Tensor, Tensor]:
    with use_kernels(True):
        return interval_attention(q, first, second, joint=joint, scale=scale)


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the norm, over what is finite; what is infinite must be so in both."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    got, want = got.detach().double(), want.detach()
    difference = (got - want)[finite].norm()
    return (difference / want[finite].norm().clamp_min(1e-30)).item()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds nan: torch.empty fills it in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(form: str, tokens: int, width: int, dtype: torch.dtype, **shape: int) -> None:
    leaves, first, second = case(form, tokens, width, dtype, **shape)
    joint = form.startswith("joint")
    exact = run(formula, leaves, first, second, torch.float64, joint)
    plain = run(formula, leaves, first, second, dtype, joint)
    ours = run(kernel, leaves, first, second, None, joint)
    names = ["out", "lse", "q", "scale", "k0", "v0", "k1", "v1", "penalty"]
    if second is None:
        del names[6:8]
    for name, got, torchs, want in zip(names, ours, plain, exact, strict=False):
        nothing = NOTHING_OF_SUMS if name in ("scale", "penalty") else NOTHING
        bound = max(2 * error(torchs, want), nothing[dtype])
        assert error(got, want) <= bound, f"{name}: {error(got, want):.2e}, torch {error(torchs, want):.2e}"


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward(form: str) -> None:
    check(form, 37, 32, torch.float32, heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["near", "joint"])
def test_half_precision(form: str, dtype: torch.dtype) -> None:
    check(form, 21, 32, dtype, heads=1)


@pytest.mark.parametrize("tokens, width", [(1, 128), (21, 96), (123, 64), (521, 32), (3, 16), (2, 40)])
def test_shapes(tokens: int, width: int) -> None:
    check("separate_near", tokens, width, torch.float32, rows=1, heads=1)


def test_rows_that_share_keys() -> None:
    check("joint_near", 5, 16, torch.float32, rows=4, key_rows=2, heads=2)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("form", FORMS)
def test_native(form: str, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 21, 123, 521, 2521):
        check(form, tokens, width, dtype, rows=4, key_rows=2, heads=3)


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_no_race(form: str) -> None:
    leaves, first, second = case(form, 1021, 64, torch.bfloat16)
    once, *again = (run(kernel, leaves, first, second, None, form.startswith("joint")) for _ in range(20))
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_reference_is_the_formula(form: str) -> None:
    leaves, first, second = case(form, 21, 16, torch.float32, rows=4, key_rows=2)
    joint = form.startswith("joint")

    def reference(q: Tensor, scale: Tensor, first: KeySet, second: KeySet | None, joint: bool) -> tuple[Tensor, Tensor]:
        return interval_attention_reference(q, first, second, joint=joint, scale=scale)

    exact = run(formula, leaves, first, second, torch.float64, joint)
    for got, want in zip(run(reference, leaves, first, second, None, joint), exact, strict=True):
        assert error(got, want) < NOTHING[torch.float32]


def test_rows_that_see_nothing() -> None:
    leaves, first, _ = case("plain", 9, 16, torch.float32)
    first = replace(first, ranges=KeyRanges(((3, 0, 0), (4, 0, 5), (2, 3, 3))))
    out, lse, *grads = run(kernel, leaves, first, None, None, False)
    want_out, want_lse, *wanted = run(formula, leaves, first, None, torch.float64, False)
    blind = [0, 1, 2, 7, 8]
    assert not out[:, blind].any() and (lse[..., blind] == -torch.inf).all() and not grads[0][:, :, blind].any()
    for got, want in zip([out, lse, *grads], [want_out, want_lse, *wanted], strict=True):
        assert error(got, want) < NOTHING[torch.float32]


def test_any_layout() -> None:
    leaves, first, _ = case("plain", 9, 16, torch.float32)
    q, scale, k, v = leaves
    want = kernel(q, scale, first, None, False)
    rows, heads, tokens, width = q.shape
    qkv = torch.full((rows, tokens, 3, heads, width), torch.nan, device=DEVICE)
    qkv[:, :, 0] = q.transpose(1, 2)
    room = torch.full((2, 1, heads, 64, width), torch.nan, device=DEVICE)  # as a cache with room for later scales
    room[0, :, :, : k.shape[2]], room[1, :, :, : k.shape[2]] = k, v
    first = replace(first, k=room[0][:, :, : k.shape[2]], v=room[1][:, :, : k.shape[2]])
    got = kernel(qkv[:, :, 0].transpose(1, 2), scale, first, None, False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_softmaxes_lie_side_by_side() -> None:
    leaves, first, second = case("separate", 9, 16, torch.float32)
    out, _ = kernel(leaves[0], leaves[1], first, second, False)
    for index, keys in enumerate((first, second)):
        alone, _ = kernel(leaves[0], leaves[1], keys, None, False)
        assert_close(out.flatten(2)[..., index * 32 : (index + 1) * 32], alone.flatten(2))  # (R, L, 2C) and (R, L, C)


def test_no_gradient_where_none_is_asked_for() -> None:
    leaves, first, _ = case("plain", 9, 16, torch.float32)
    q, scale, k, v = leaves
    out, _ = kernel(q, scale, replace(first, v=v.requires_grad_()), None, False)
    out.sum().backward()
    assert v.grad is not None and q.grad is scale.grad is k.grad is None
    assert not kernel(q, scale, replace(first, v=v.detach()), None, False)[0].requires_grad


@pytest.mark.parametrize("form", ["plain", "near"])
def test_dispatcher(form: str) -> None:
    (q, _, k, v, *_), keys, _ = case(form, 9, 16, torch.float32)
    q.requires_grad_()
    results = []
    for on in (False, True):
        with use_kernels(on):
            results.append(attend_ranges(q, k, v, keys.ranges, nearness=keys.nearness, return_lse=True))
    (plain, plain_lse), (ours, our_lse) = results
    assert_close(ours, plain)
    assert_close(our_lse, plain_lse)
    assert runs_ours(ours) and not runs_ours(plain)
    with use_kernels(True):
        assert not runs_ours(attend_ranges(q, k, v, None)[0])  # no mask, no lse: torch is faster
        out, lse = attend_ranges(q, k, v, None, return_lse=True)
        assert runs_ours(out) and lse is not None
        assert not runs_ours(attend_ranges(q[..., :12], k[..., :12], v[..., :12], keys.ranges)[0])  # no such width


def launches(out: Tensor) -> int:
    """Attention kernels that this came from."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return sum("IntervalAttention" in node.name() for node in seen)


def runs_ours(out: Tensor) -> bool:
    return launches(out) > 0


def test_errors() -> None:
    (q, *_), first, second = case("separate", 9, 16, torch.float32)
    weight = torch.ones(1, 9, device=DEVICE)
    with pytest.raises(ValueError, match="needs two key sets"):
        interval_attention(q, first, joint=True)
    with pytest.raises(ValueError, match="belong to the last key set"):
        interval_attention(q, replace(first, weight=weight), second)
    with pytest.raises(ValueError, match="head width of q"):
        interval_attention(q[..., :8], first)
    with pytest.raises(ValueError, match="divides the rows"):
        interval_attention(q[:1], first)
    with pytest.raises(ValueError, match="key ranges for 8 queries and 5 keys"):
        interval_attention(q, replace(first, ranges=KeyRanges(((8, 0, 5),))))
    with pytest.raises(ValueError, match="without gradient"):
        interval_attention(q, replace(first, weight=weight.requires_grad_()))


@pytest.mark.parametrize("fusion", ["separate", "joint"])
def test_training_through_the_kernel(fusion: str) -> None:
    """Backbone, condition prefill and reference attention give the same with it: logits, and gradients."""
    torch.manual_seed(0)
    backbone: Any = tiny_backbone(depth=2)
    config = ScaleWeaverConfig(
        kind="canny", fusion=fusion, inject_blocks=(0, 1), lora_rank=4, locality=0.5, z_init="normal"
    )
    adapter = add_control(backbone, config, "canny")
    target, schedule = ResidualTarget(BITS, PATCH), tiny_schedule()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, BITS, *target.final_grid(schedule), generator=generator).to(DEVICE)
    mask = torch.rand(1, 1, 9, 9, generator=generator).to(DEVICE)
    backbone, adapter = backbone.to(DEVICE), adapter.to(DEVICE)
    attention = backbone.blocks[0].attn
    leaves = [adapter.log_locality, attention.log_scale.requires_grad_(), attention.qkv.lora_B.canny.weight]
    leaves += list(adapter.z["0"].parameters()) if fusion == "separate" else []
    results = []
    for on in (False, True):
        with use_kernels(on):
            bank = encode(backbone, adapter, "canny", latents, schedule, target)
            text = backbone.encode_text(tiny_text([5]))
            inputs, _, _ = target.labels(latents, schedule)
            reads = ReferenceInjector(bank, adapter, (1.0, 0.5, 1.0, 0.0), mask=mask)
            logits = backbone(inputs, schedule.steps, text, KVCache(), injectors=(reads,))
            loss = logits.square().mean()
            results.append([logits, *torch.autograd.grad(loss, leaves)])
            # one for the condition's first block, and one for own and reference attention together in each block
            assert launches(logits) == 3 * on and runs_ours(bank.keys[1]) is on
    for plain, ours in zip(*results, strict=True):
        assert plain.abs().max() > 0
        assert_close(ours, plain, atol=3e-5 * plain.abs().max().item(), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fusion, alone", [("separate", False), ("separate", True), ("joint", True)])
def test_what_one_launch_reads(fusion: str, alone: bool) -> None:
    """The first control shares the launch of the image's own keys, others and those that a row does not see do not."""
    torch.manual_seed(0)
    backbone: Any = tiny_backbone(depth=1)
    target, schedule = ResidualTarget(BITS, PATCH), tiny_schedule()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, BITS, *target.final_grid(schedule), generator=generator).to(DEVICE)
    injectors = []
    for name, settings in (("canny", {"z_position": "after_gate"}), ("depth", {"locality": 2.0})):
        config = ScaleWeaverConfig(kind=name, fusion=fusion, inject_blocks=(0,), z_init="normal", **settings)
        adapter = add_control(backbone, config, name).to(DEVICE)
        bank = encode(backbone.to(DEVICE), adapter, name, latents, schedule, target)
        sees = (True, name == "canny")
        injectors.append(ReferenceInjector(bank, adapter, (1.0,) * 4, sees, images=2))
    text = backbone.encode_text(tiny_text([5, 3, 4, 2]))
    inputs = torch.randn(4, schedule.length - 1, backbone.config.bits, generator=generator).to(DEVICE)
    steps = schedule.steps[:1] if alone else schedule.steps
    given = (None if alone else inputs, steps, text)
    q = torch.zeros(4, backbone.config.heads, steps[-1].stop, 16, device=DEVICE)
    with use_kernels(True):
        offers = [injector.keys(0, steps, q) is not None for injector in injectors]
        assert offers == [not alone or fusion == "joint", False]  # the second has rows that do not see it
    found = []
    for on in (False, True):
        with use_kernels(on):
            found.append([backbone(*given, KVCache(), injectors=order) for order in (injectors, injectors[::-1])])
    for plain, ours in zip(*found, strict=True):
        assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert (found[0][0] - backbone(*given, KVCache())).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["block_causal", "same_scale"])
@pytest.mark.parametrize("penalised", [False, True])
def test_calls_run_by_run_are_a_mask(scope: Any, penalised: bool) -> None:
    steps = infinity_schedule().steps[:6]
    tokens, draw = sum(step.n for step in steps), torch.Generator().manual_seed(0)
    ranges = key_ranges(steps, scope)
    leaves = [torch.randn(2, 2, tokens, 8, generator=draw, requires_grad=True) for _ in range(3)]
    penalty = torch.tensor(0.3, requires_grad=True)
    near = nearness(steps, "same", penalty, torch.device("cpu")) if penalised else None
    mask = ranges.dense(tokens, torch.device("cpu"))
    if near is not None:
        mask = (-penalty * near.squared_distances()).masked_fill(~mask, -torch.inf)
    learning = [*leaves, penalty] if penalised else leaves
    want, want_lse = attend(*leaves, mask=mask, return_lse=True)
    grad = torch.randn(want.shape, generator=draw)
    want_grads = torch.autograd.grad(want, learning, grad, retain_graph=True)
    for return_lse in (False, True):
        out, lse = attend_ranges(*leaves, ranges, nearness=near, return_lse=return_lse)
        assert_close(out, want, atol=1e-5, rtol=1e-5)
        if lse is not None:
            assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
        for found, expected in zip(torch.autograd.grad(out, learning, grad), want_grads, strict=True):
            assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_few_hidden_keys_of_a_small_mask_are_hidden() -> None:
    large, small = (key_ranges(infinity_schedule().steps[:count], "block_causal") for count in (6, 3))
    assert splits(large, large.end) and not splits(small, small.end)
    assert splits(KeyRanges(((4, 0, 4), (4, 4, 8))), 8)
    assert not splits(KeyRanges(((4, 0, 4), (4, 8, 8))), 8)  # rows that see nothing need the mask
