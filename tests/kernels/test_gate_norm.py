"""The gate and norm kernel against the formula in float64: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_errors import DEVICE, GPU, assert_as_exact_as_torch, poisoned
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.kernels.gate_norm import gate_norm, gate_norm_reference, modulate, modulate_reference

pytest.importorskip("triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = ("modulate", "gate", "gate shared", "affine", "add")
# stream and layer in one format, or a float32 stream before 16-bit layers as in the backbone
SOME = [
    ("modulate", 21, 96, F32, F32),
    ("modulate", 1, 128, F32, BF16),
    ("gate", 123, 64, F32, F32),
    ("gate", 21, 128, F32, BF16),
    ("gate", 21, 32, F16, F16),
    ("gate shared", 21, 100, F32, F16),
    ("affine", 521, 32, F32, F32),
    ("affine", 21, 64, F32, BF16),
    ("affine", 1, 96, BF16, BF16),
    ("add", 21, 2100, F32, F32),
    ("add", 21, 64, F32, BF16),
]
WIDTHS = (32, 64, 96, 128, 768, 2048, 3584)
TYPES = ((F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16))
ALL = [(f, n, c, *t) for f in FORMS for n in (1, 21, 123, 521, 2521) for c in WIDTHS for t in TYPES]  # for GPUs


def case(form: str, tokens: int, width: int, stream: torch.dtype, layer: torch.dtype) -> tuple[dict, list[Tensor]]:
    """Leaves by name, and gradients of the results."""
    draw = torch.Generator().manual_seed(tokens * 10_000 + width)

    def normal(*shape: int, dtype: torch.dtype = stream) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype).requires_grad_()

    rows = 2 if tokens < 500 else 1
    leaves = {"x": normal(rows, tokens, width)}
    if form == "affine":
        leaves |= {"scale": normal(width), "shift": normal(width)}
    else:  # as the backbone has them: six vectors of a row behind one another
        leaves["six"] = normal(1 if form == "gate shared" else rows, 1, 6, width)
    if form != "modulate":
        leaves["branch"] = normal(rows, tokens, width, dtype=layer)
    if form == "affine":
        leaves |= {"gate": normal(rows, 1, width), "term": normal(rows, tokens, width, dtype=layer)}
    grads = [torch.randn(rows, tokens, width, generator=draw).to(DEVICE) for _ in range(2)]
    return leaves, grads


def formula(form: str, leaves: dict[str, Tensor]) -> list[Tensor]:
    x = leaves["x"]
    if form == "affine":
        gate, factor, shift = leaves["gate"], leaves["scale"], leaves["shift"]
    else:
        gate, _, factor, _, shift, _ = leaves["six"].unbind(2)
        factor = 1 + factor
    if form != "modulate":
        x = x + (leaves["branch"] if form == "add" else gate * leaves["branch"]) + 3 * leaves.get("term", 0)
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return [*([] if form == "modulate" else [x]), z * factor + shift]


def call(form: str, leaves: dict[str, Tensor], layer: torch.dtype, join: Callable, norm: Callable) -> list[Tensor]:
    if form == "affine":
        terms = [leaves["term"], 2 * leaves["term"]]
        given = (leaves["x"], leaves["branch"], leaves["gate"], leaves["scale"], leaves["shift"])
        return list(join(*given, affine=True, terms=terms, dtype=layer))
    gate, _, scale, _, shift, _ = leaves["six"].unbind(2)
    if form == "modulate":
        return [norm(leaves["x"], scale, shift, dtype=layer)]
    return list(join(leaves["x"], leaves["branch"], None if form == "add" else gate, scale, shift, dtype=layer))


def with_gradients(outputs: list[Tensor], leaves: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, list(leaves.values()), grads)]


@pytest.mark.parametrize(("form", "tokens", "width", "stream", "layer"), SOME + (ALL if GPU else []))
def test_forward_and_backward_are_as_exact_as_torch(form, tokens, width, stream, layer):
    leaves, grads = case(form, tokens, width, stream, layer)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    # what reaches the formula are gradients in the formats of the results
    formats = [layer] if form == "modulate" else [stream, layer]
    truth = with_gradients(formula(form, exact), exact, [g.to(f) for g, f in zip(grads, formats, strict=False)])
    plain = with_gradients(call(form, leaves, layer, gate_norm_reference, modulate_reference), leaves, grads)
    with use_kernels(True), poisoned():
        ours = with_gradients(call(form, leaves, layer, gate_norm, modulate), leaves, grads)
    assert_as_exact_as_torch(ours, plain, truth)


def test_without_gradients_nothing_changes():
    leaves, _ = case("affine", 21, 64, F32, BF16)
    with use_kernels(True):
        traced = call("affine", leaves, BF16, gate_norm, modulate)
        with torch.inference_mode():
            plain = call("affine", leaves, BF16, gate_norm, modulate)
    assert all(torch.equal(a, b) for a, b in zip(traced, plain, strict=True))
    assert traced[0].requires_grad and not plain[0].requires_grad


def test_only_what_learns_gets_a_gradient():
    leaves, grads = case("gate", 21, 64, F32, F32)
    leaves["six"].requires_grad_(False)
    wanted = {name: leaves[name] for name in ("x", "branch")}
    full = with_gradients(call("gate", leaves, F32, gate_norm_reference, modulate_reference), wanted, grads)
    with use_kernels(True):
        ours = with_gradients(call("gate", leaves, F32, gate_norm, modulate), wanted, grads)
    for a, b in zip(ours, full, strict=True):
        assert_close(a, b)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter runs one program after the other")
def test_two_runs_give_the_same_bits():
    leaves, grads = case("gate", 2521, 2048, F32, BF16)
    runs = []
    with use_kernels(True):
        for _ in range(5):
            runs.append(with_gradients(call("gate", leaves, BF16, gate_norm, modulate), leaves, grads))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_shapes_that_do_not_fit():
    x, vector = torch.zeros(2, 3, 8, device=DEVICE), torch.zeros(2, 1, 8, device=DEVICE)
    with use_kernels(True):
        with pytest.raises(ValueError, match="branch of shape"):
            gate_norm(x, x[:, :2], vector, vector, vector)
        with pytest.raises(ValueError, match="scale of shape"):
            modulate(x, vector[..., :4], vector)
        with pytest.raises(ValueError, match="shift of shape"):
            gate_norm(x, x, vector, vector[0, 0], vector, affine=True)
