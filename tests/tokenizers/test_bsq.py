"""The bitwise tokenizer as a model: whole path, straight-through training, save and load, number formats."""

from pathlib import Path

import pytest
import torch
from bsq_golden import Golden
from torch import Tensor

from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer, bit_entropy


@pytest.fixture
def images(small_schedule: ScaleSchedule) -> Tensor:
    noise = torch.rand(2, 3, small_schedule.height, small_schedule.width, generator=torch.Generator().manual_seed(0))
    return noise * 2 - 1


@torch.no_grad()
def test_picture_to_bits_to_picture(golden: Golden) -> None:
    tokenizer = golden.tokenizer()
    bits, latent = tokenizer.quantize(tokenizer.encode(golden.get("image")), golden.schedule)
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(bits, golden.scales("bits"), strict=True))
    torch.testing.assert_close(latent, golden.get("quantized"), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode(latent), golden.get("decoded"), atol=1e-4, rtol=0)


def test_training_code_has_the_values_of_inference(
    small_tokenizer: BSQTokenizer, small_schedule: ScaleSchedule, images: Tensor
) -> None:
    latent = small_tokenizer.encode(images)
    code = small_tokenizer.quantize_train(latent, small_schedule)
    bits, final = small_tokenizer.quantize(latent, small_schedule)
    scales = list(small_tokenizer.target.quantize(latent, small_schedule))
    assert torch.equal(code.latent, final)
    assert all(torch.equal(a, b) for a, b in zip(code.bits, bits, strict=True))
    assert all(torch.equal(a, scale.latent) for a, scale in zip(code.running, scales, strict=True))
    assert code.commitment.shape == code.entropy.shape == (3,)
    torch.testing.assert_close(code.commitment[-1], (latent - final).square().mean())


def test_straight_through_gradients(small_tokenizer: BSQTokenizer, small_schedule: ScaleSchedule) -> None:
    latent = torch.randn(2, 8, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    code = small_tokenizer.quantize_train(latent, small_schedule)
    weight = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    (last,) = torch.autograd.grad((code.latent * weight).sum(), latent, retain_graph=True)
    assert torch.equal(last, weight)  # the identity at the last scale
    (first,) = torch.autograd.grad((code.running[0] * weight).sum(), latent, retain_graph=True)
    blocks = first.unflatten(2, (2, 3)).unflatten(4, (2, 4))  # the 2x2 grid of scale 0 only moves block means
    torch.testing.assert_close(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))
    (commitment,) = torch.autograd.grad(code.commitment[-1], latent, retain_graph=True)
    torch.testing.assert_close(commitment, 2 * (latent - code.latent).detach() / latent.numel())
    (entropy,) = torch.autograd.grad(code.entropy.sum(), latent)
    assert entropy.isfinite().all() and entropy.abs().sum() > 0


def test_entropy_rewards_sure_and_balanced_bits() -> None:
    half = torch.ones(2, 4, 1, 1) / 2
    balanced = half * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert bit_entropy(balanced, 100.0) < bit_entropy(half, 100.0) < 1e-4  # sure; only the first uses both values
    torch.testing.assert_close(bit_entropy(balanced, 100.0), -torch.tensor(2.0).log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(bit_entropy(balanced, 0.0), torch.tensor(0.0))  # unsure everywhere


def test_a_few_steps_lower_the_loss(
    small_tokenizer: BSQTokenizer, small_schedule: ScaleSchedule, images: Tensor
) -> None:
    optimizer = torch.optim.Adam(small_tokenizer.parameters(), lr=3e-3)
    smooth = torch.nn.functional.avg_pool2d(images, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    losses = []
    for _ in range(12):
        picture, code = small_tokenizer(smooth, small_schedule)
        loss = (picture - smooth).square().mean() + 0.25 * code.commitment[-1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in small_tokenizer.parameters())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_save_and_load(
    small_tokenizer: BSQTokenizer, small_schedule: ScaleSchedule, images: Tensor, tmp_path: Path
) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    again = BSQTokenizer.from_pretrained(tmp_path)
    assert again.config.patch == 2 and again.target == small_tokenizer.target
    latent = small_tokenizer.encode(images)
    assert torch.equal(again.encode(images), latent)
    assert torch.equal(again.decode(latent), small_tokenizer.decode(latent))


@torch.no_grad()
def test_bfloat16_and_channels_last(small_tokenizer: BSQTokenizer, images: Tensor) -> None:
    latent = small_tokenizer.encode(images)
    picture = small_tokenizer.decode(latent)
    small_tokenizer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(small_tokenizer.decode(latent), picture, atol=1e-5, rtol=0)
    small_tokenizer.to(torch.bfloat16)
    half = small_tokenizer.decode(latent)
    assert half.dtype == torch.float32 and (half - picture).abs().mean() < 0.02
    assert small_tokenizer.encode(images).dtype == torch.float32


def test_bad_input(small_tokenizer: BSQTokenizer) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        small_tokenizer.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match="preset 'd8' is unknown"):
        BSQTokenizer.preset("d8")
