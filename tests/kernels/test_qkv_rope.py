"""The projection kernel against the formula in float64: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_errors import DEVICE, GPU, assert_as_exact_as_torch, poisoned
from tiny import tiny_backbone, tiny_schedule, tiny_text
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.cache import KVCache, SlidingWindow
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.kernels.qkv_rope import qkv_rope, qkv_rope_reference

pytest.importorskip("triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SOME = [(1, 96, F32), (21, 128, F32), (123, 64, F32), (521, 32, F32), (21, 32, F16), (1, 128, F16), (21, 32, BF16)]
SOME += [(1, 96, BF16)]
ALL = [(n, d, t) for n in (1, 21, 123, 521, 2521) for d in (32, 64, 96, 128) for t in (F32, F16, BF16)]  # for GPUs


def case(tokens: int, width: int, dtype: torch.dtype, rows: int = 2, heads: int = 2) -> tuple[list[Tensor], ...]:
    """Leaves (qkv, q_bias, v_bias, log_scale), rope (cos, sin), gradients of q, k, v with strides of their own."""
    draw = torch.Generator().manual_seed(tokens * 1000 + width)
    size = heads * width
    leaves = [torch.randn(*shape, generator=draw) for shape in ((rows, tokens, 3 * size), (size,), (size,))]
    # under autocast 16-bit projections meet float32 biases, with 16-bit weights they are all alike
    leaves = [leaf.to(DEVICE, dtype if leaf is leaves[0] or dtype == BF16 else F32) for leaf in leaves]
    leaves.append(torch.linspace(1.0, 5.0, heads, device=DEVICE))  # the last is above log 100
    angles = torch.rand(tokens, width // 2, generator=draw, dtype=torch.float64) * 60
    rope = [angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)]
    grads = [torch.randn(rows, tokens, heads, width, generator=draw).to(DEVICE, dtype) for _ in range(3)]
    return [leaf.requires_grad_() for leaf in leaves], rope, [grad.transpose(1, 2) for grad in grads]


def formula(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor, rope: list[Tensor]) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(2, (3, len(log_scale), -1)).permute(2, 0, 3, 1, 4)  # (R, H, L, D)
    cos, sin = rope

    def turn(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    q, v = (x + bias.view(len(log_scale), 1, -1) for x, bias in ((q, q_bias), (v, v_bias)))
    scale = log_scale.clamp(max=math.log(100)).exp()[:, None, None]
    return turn(scale * q / q.norm(dim=-1, keepdim=True)), turn(k / k.norm(dim=-1, keepdim=True)), v


def results(function: Callable, leaves: list[Tensor], rope: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """q, k, v and the gradients of the leaves."""
    outputs = function(*leaves, rope)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize(("tokens", "width", "dtype"), SOME + (ALL if GPU else []))
def test_forward_and_backward_are_as_exact_as_torch(tokens, width, dtype):
    leaves, rope, grads = case(tokens, width, dtype, rows=2 if tokens < 100 else 1)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(formula, exact, [t.double() for t in rope], [g.double() for g in grads])
    plain = results(qkv_rope_reference, leaves, rope, grads)
    with use_kernels(True), poisoned():
        ours = results(qkv_rope, leaves, rope, grads)
    assert ours[6][-1] == 0  # the last temperature has stopped at 100
    # roots, quotients and exponentials of a GPU err by a few units of the last place in float32
    assert_as_exact_as_torch(ours[:6], plain[:6], truth[:6], floor=2e-7 if GPU and dtype == F32 else None)
    # one number per head, summed over everything: what cancels is luck
    assert_as_exact_as_torch(ours[6:], plain[6:], truth[6:], floor=4e-6 if dtype == F32 else 4e-3)


def test_keys_and_values_go_to_their_place_and_nowhere_else():
    leaves, rope, _ = case(21, 32, F32)
    leaves = [leaf.detach() for leaf in leaves]
    room = torch.full((2, 2, 2, 40, 32), 7.0, device=DEVICE)
    for on in (False, True):
        k, v = room.fill_(7.0)[:, :, :, 5:26]
        with use_kernels(on):
            plain, placed = qkv_rope(*leaves, rope), qkv_rope(*leaves, rope, into=(k, v))
        assert placed[1].data_ptr() == k.data_ptr() and placed[2].data_ptr() == v.data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(plain, placed, strict=True))
        assert (room[:, :, :, :5] == 7).all() and (room[:, :, :, 26:] == 7).all()


def test_a_vector_of_zeros_stays_one():
    leaves, rope, grads = case(3, 32, F32)
    with torch.no_grad():
        leaves[0].zero_(), leaves[1].zero_()
    with use_kernels(True):
        ours = results(qkv_rope, leaves, rope, grads)
    assert not ours[0].any() and not ours[1].any() and all(t.isfinite().all() for t in ours)


def test_frozen_biases_get_no_sums():
    leaves, rope, grads = case(21, 32, F32)
    full = results(qkv_rope_reference, leaves, rope, grads)
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    with use_kernels(True):
        outputs = qkv_rope(*leaves, rope)
    assert_close(torch.autograd.grad(outputs, leaves[:1], grads)[0], full[3])


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter runs one program after the other")
def test_two_runs_give_the_same_bits():
    given = case(2521, 128, BF16)
    with use_kernels(True):
        first, *others = (results(qkv_rope, *given) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_shapes_that_do_not_fit():
    leaves, rope, _ = case(3, 32, F32)
    with pytest.raises(ValueError, match="3 \\* heads"):
        qkv_rope(leaves[0][:, :2], *leaves[1:], rope)
    room = torch.empty(2, 2, 3, 32, device=DEVICE)
    with pytest.raises(ValueError, match="room for keys and values"):
        qkv_rope(*leaves, rope, into=(room[:, :, :2], room[:, :, :2]))
    with use_kernels(True), torch.no_grad(), pytest.raises(ValueError, match="strides"):
        qkv_rope(*leaves, rope, into=(room, room.transpose(0, 1).contiguous().transpose(0, 1)))


def scale_by_scale(model: InfinityTransformer, cache: KVCache) -> tuple[Tensor, set[int]]:
    """Logits of all scales, and where the keys of the first layer lay after each scale that is kept."""
    steps, places = tiny_schedule().steps, set()
    text = model.encode_text(tiny_text())
    inputs = torch.randn(2, steps[-1].stop - 1, model.config.bits, generator=torch.Generator().manual_seed(1))
    logits = []
    for step in steps:
        given = inputs[:, step.start - 1 : step.stop - 1].to(DEVICE) if step.index else None
        logits.append(model(given, (step,), text, cache))
        places.add(cache._layers[0][0].data_ptr())
    return torch.cat(logits, dim=1), places


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 9])
def test_a_backbone_on_kernels_draws_like_one_on_torch(window):
    model = tiny_backbone().to(DEVICE)
    found = []
    for on in (False, True):
        with use_kernels(on):
            found.append(scale_by_scale(model, KVCache(None if window is None else SlidingWindow(window))))
    (plain, _), (ours, places) = found
    assert_close(ours, plain, atol=2e-5, rtol=0)
    assert len(places) == 1 or window is not None  # written behind one another in one piece of memory


def test_a_backbone_on_kernels_learns_like_one_on_torch():
    steps, gradients = tiny_schedule().steps, []
    for on in (False, True):
        model = tiny_backbone(depth=1).to(DEVICE)
        if on:
            model.enable_gradient_checkpointing()
        inputs = torch.randn(2, 29, model.config.bits, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with use_kernels(on):
            model(inputs, steps, model.encode_text(tiny_text()), KVCache()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_in_place_is_the_formula(dtype: torch.dtype) -> None:
    leaves, rope, _ = case(21, 32, dtype)
    given = leaves[0].detach().clone()
    with use_kernels(False):
        want = qkv_rope(*leaves, rope)
        with torch.no_grad():
            found = qkv_rope(*leaves, rope)
            room = tuple(torch.empty(2, 2, 40, 32, dtype=dtype, device=DEVICE)[:, :, 9:30] for _ in range(2))
            placed = qkv_rope(*leaves, rope, into=room)
    for ours, other, expected in zip(found, placed, want, strict=True):
        assert torch.equal(ours, expected) and torch.equal(other, expected) and ours.dtype == dtype
    assert placed[1].data_ptr() == room[0].data_ptr() and torch.equal(leaves[0], given)
