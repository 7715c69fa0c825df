"""The sampling kernel against the formula in float64: in Triton's interpreter, and natively on a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_errors import DEVICE, GPU, poisoned
from torch import Tensor
from torch.testing import assert_close

from scaleweaver.guidance import ControlGuidance
from scaleweaver.kernels.bit_sampling import sample_bits, sample_bits_reference, unpack_codes, unpack_codes_reference
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.sampling import BitwiseSampler, exponential
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.target import ResidualTarget

pytest.importorskip("triton")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TEXT, CONTROL, MANY = (3.0, -2.0), (3.0, -1.0, -1.0), (4.0, 0.0, -2.5, 0.5, -1.0)
SOME = [
    ((1.0,), 1, 16, F32),
    ((1.0,), 2521, 4, F32),
    (TEXT, 21, 32, F32),
    (TEXT, 123, 13, BF16),
    (CONTROL, 21, 56, F16),
    (MANY, 521, 4, F32),
    (MANY, 21, 16, BF16),
]
ALL = [  # for GPUs
    (w, n, bits, dtype)
    for w in ((1.0,), TEXT, CONTROL, MANY)
    for n in (1, 21, 123, 521, 2521)
    for bits in (16, 32, 56)
    for dtype in (F32, F16, BF16)
]


def case(branches: int, tokens: int, bits: int, dtype: torch.dtype, images: int = 2) -> tuple[Tensor, Tensor]:
    """Logits of all branches, and one stream of noise per image."""
    draw = torch.Generator().manual_seed(tokens * 100 + bits)
    logits = 3 * torch.randn(branches * images, tokens, bits, generator=draw)
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return logits.to(DEVICE, dtype), exponential((images, tokens, bits, 2), generators, DEVICE)


def evidence(
    logits: Tensor, noise: Tensor, weights: tuple[float, ...], temperature: float, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, for every bit: how far the likelier value, the draw and the nucleus are from tipping over."""
    mixed = sum(w * part.double() for w, part in zip(weights, logits.chunk(len(weights)), strict=True) if w)
    mixed = mixed / temperature
    drawn = mixed - noise[..., 1].double().log() + noise[..., 0].double().log()
    return mixed, drawn, (-mixed.abs()).sigmoid() - (1 - top_p)


@pytest.mark.parametrize(("weights", "tokens", "bits", "dtype"), SOME + (ALL if GPU else []))
def test_every_bit_is_the_formula_s_unless_it_stands_on_the_edge(weights, tokens, bits, dtype):
    logits, noise = case(len(weights), tokens, bits, dtype)
    if 0.0 in weights:  # a dead branch may hold anything
        logits.view(len(weights), 2, tokens, -1)[weights.index(0.0)] = torch.nan
    for temperature, top_p in ((1.0, 0.0), (0.6, 0.9)):
        likelier, drawn, inside = evidence(logits, noise, weights, temperature, top_p)
        with use_kernels(True), poisoned():
            ours = sample_bits(logits, noise, weights=weights, temperature=temperature, top_p=top_p)
            greedy = sample_bits(logits, None, weights=weights, temperature=temperature)
        assert ours.dtype == greedy.dtype == torch.uint8 and ours.shape == noise.shape[:3]
        cut = (inside <= 0) if top_p else torch.zeros_like(inside, dtype=torch.bool)
        truth = torch.where(cut, likelier > 0, drawn > 0)
        edge = torch.minimum(likelier.abs(), drawn.abs())
        edge = torch.minimum(edge, inside.abs()) if top_p else edge
        firm = edge > 1e-5
        assert torch.equal(ours[firm], truth[firm].to(torch.uint8)) and firm.float().mean() > 0.99
        assert torch.equal(greedy[likelier.abs() > 1e-5], (likelier > 0)[likelier.abs() > 1e-5].to(torch.uint8))


def test_float32_bits_are_those_of_torch():
    logits, noise = case(3, 123, 16, F32)
    for settings in ({}, {"top_p": 0.9}, {"temperature": 0.5, "top_p": 0.97}):
        plain = sample_bits_reference(logits, noise, weights=CONTROL, **settings)
        with use_kernels(True):
            ours = sample_bits(logits, noise, weights=CONTROL, **settings)
        assert (ours != plain).sum() <= 1  # a bit on the edge may fall to either side
        assert 0.2 < plain.float().mean() < 0.8


def test_the_weights_are_those_of_the_guidance():
    step = ScaleSchedule(((1, 1), (3, 7)), (3, 7)).steps[1]
    guidance = ControlGuidance(3.0, [2.0, 1.5], 2)
    logits, noise = case(guidance.branches, step.n, 16, F32)
    weights = guidance.weights(step)
    assert weights == (3.0, -2.0, -1.5, 0.5, 1.0)
    mixed = guidance.combine(logits, step)
    with use_kernels(True):
        ours = sample_bits(logits, noise, weights=weights, temperature=0.8)
        apart = sample_bits(mixed, noise, temperature=0.8)
    assert (ours != apart).sum() <= 1


def test_a_sampler_on_kernels_draws_what_it_draws_on_torch():
    step = ScaleSchedule(((1, 1), (9, 9)), (9, 9)).steps[1]
    logits = case(1, step.n, 8, F32, images=3)[0]

    def draw(rows: slice, top_k: int = 0) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)[rows]]
        return BitwiseSampler(0.7, top_k, 0.95).sample(logits[rows], step, generators)

    plain, greedy = draw(slice(None)), draw(slice(None), 1)
    with use_kernels(True):
        ours = draw(slice(None))
        assert torch.equal(ours[1:2], draw(slice(1, 2)))  # whatever batch a picture is drawn in
        assert torch.equal(draw(slice(None), 1), greedy)
    assert (ours != plain).sum() <= 1


@pytest.mark.parametrize(("grid", "patch", "bits"), [((1, 1), 1, 16), ((3, 7), 1, 13), ((3, 7), 2, 14), ((5, 2), 3, 2)])
def test_codes_lie_where_the_tokenizer_has_them(grid, patch, bits):
    target = ResidualTarget(bits, patch)
    step = ScaleSchedule((grid,), grid).steps[0]
    drawn = torch.randint(0, 2, (2, step.n, target.width), generator=torch.Generator().manual_seed(0))
    drawn = drawn.to(DEVICE, torch.uint8)
    want = target.codes(target.unpack(drawn, step)).permute(0, 3, 1, 2)
    assert torch.equal(unpack_codes_reference(drawn, grid, patch), want)
    with use_kernels(True), poisoned():
        assert_close(unpack_codes(drawn, grid, patch), want)
        assert_close(target.absorb(torch.ones_like(want), drawn, step), 1 + want)


def test_the_frequencies_are_the_probabilities():
    share = torch.tensor([0.05, 0.3, 0.8])
    logits = share.logit().expand(1, 5000, 3)
    noise = exponential((1, 5000, 3, 2), [torch.Generator().manual_seed(1)], DEVICE)
    with use_kernels(True):
        drawn = sample_bits(logits.to(DEVICE), noise).float().mean((0, 1)).cpu()
        cut = sample_bits(logits.to(DEVICE), noise, top_p=0.9).float().mean((0, 1)).cpu()
    assert_close(drawn, share, atol=0.02, rtol=0)
    assert cut[0] == 0 and torch.equal(cut[1:], drawn[1:])


@pytest.mark.skipif(not GPU, reason="needs a GPU: the interpreter runs one program after the other")
def test_two_runs_give_the_same_bits():
    logits, noise = case(3, 2521, 56, F32)
    with use_kernels(True):
        first, *others = (sample_bits(logits, noise, weights=CONTROL, top_p=0.9) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_shapes_that_do_not_fit():
    logits, noise = case(3, 4, 8, F32)
    with pytest.raises(ValueError, match="2 weights"):
        sample_bits(logits[:5], noise, weights=TEXT)
    with pytest.raises(ValueError, match="expected"):
        sample_bits(logits, noise[:, :3], weights=CONTROL)
