"""Residual bits: reference numbers, layouts, and the invariants that generation and training rest on."""

import pytest
import torch
from bsq_golden import Golden

from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.target import ResidualTarget

EXACT = {"atol": 1e-5, "rtol": 0}


def test_residual_scales(golden: Golden) -> None:
    scales = list(golden.target.quantize(golden.get("encoder_out"), golden.schedule))
    assert len(scales) == 4
    for scale, rest, bits, total in zip(
        scales, golden.scales("residual_in"), golden.scales("bits"), golden.scales("cum_latent"), strict=True
    ):
        torch.testing.assert_close(scale.residual, rest[:, :, 0], **EXACT)
        torch.testing.assert_close(scale.latent, total[:, :, 0], **EXACT)
        assert torch.equal(scale.bits, bits[:, 0])


def test_latent_from_bits(golden: Golden) -> None:
    target, schedule = golden.target, golden.schedule
    latent = target.initial(1, schedule)
    for step, bits in zip(schedule.steps, golden.scales("bits"), strict=True):
        latent = target.absorb(latent, target.pack(bits[:, 0]), step)
    torch.testing.assert_close(latent, golden.get("latent_from_bits")[:, :, 0], **EXACT)


def test_teacher_forcing(golden: Golden) -> None:
    inputs, labels, latent = golden.target.labels(golden.get("encoder_out"), golden.schedule)
    torch.testing.assert_close(inputs, golden.get("bsc_clean.x_in"), **EXACT)
    torch.testing.assert_close(latent, golden.get("quantized"), **EXACT)
    assert torch.equal(labels, torch.cat(golden.scales("bsc_clean.labels"), dim=1))
    assert labels.dtype == torch.uint8


def test_self_correction_with_given_flips(golden: Golden) -> None:
    flips = [mask[:, 0] for mask in golden.scales("bsc_noisy.flip_mask")]
    inputs, labels, masks = golden.target.self_correct(golden.get("encoder_out"), golden.schedule, flips=flips)
    torch.testing.assert_close(inputs, golden.get("bsc_noisy.x_in"), **EXACT)
    assert torch.equal(labels, torch.cat(golden.scales("bsc_noisy.labels"), dim=1))
    assert all(a is b for a, b in zip(masks, flips, strict=True))
    scales = list(golden.target.quantize(golden.get("encoder_out"), golden.schedule, flips))
    for scale, truth in zip(scales, golden.scales("bsc_noisy.gt_bits"), strict=True):
        assert torch.equal(scale.bits, truth[:, 0])
    for scale, flip, said in zip(scales, flips, golden.scales("bsc_noisy.pred_bits"), strict=False):
        assert torch.equal(scale.bits ^ flip, said[:, 0])


@pytest.fixture
def target() -> ResidualTarget:
    return ResidualTarget(bits=3, patch=2)


@pytest.fixture
def latent(target: ResidualTarget, small_schedule: ScaleSchedule) -> torch.Tensor:
    shape = (2, target.bits, *target.final_grid(small_schedule))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.5


def test_pack_order(target: ResidualTarget) -> None:
    schedule = ScaleSchedule(((2, 3),), position_grid=(2, 3))
    bits = torch.randint(0, 2, (2, 4, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = target.pack(bits)
    assert packed.shape == (2, 6, target.width)
    for y in range(4):
        for x in range(6):
            for c in range(3):
                token, channel = (y // 2) * 3 + x // 2, c * 4 + (y % 2) * 2 + x % 2
                assert torch.equal(packed[:, token, channel], bits[:, y, x, c])
    assert torch.equal(target.unpack(packed, schedule.steps[0]), bits)


def test_codes_are_unit_vectors(target: ResidualTarget) -> None:
    codes = target.codes(torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8))
    torch.testing.assert_close(codes, torch.tensor([[-1.0, 1, 1], [1, -1, -1]]) / 3**0.5)


def test_generation_reads_what_training_read(
    target: ResidualTarget, latent: torch.Tensor, small_schedule: ScaleSchedule
) -> None:
    inputs, labels, final = target.labels(latent, small_schedule)
    assert labels.shape == (2, small_schedule.length, target.width)
    total = target.initial(2, small_schedule)
    for step in small_schedule.steps:
        if step.index:
            first = small_schedule.steps[0].n
            assert torch.equal(target.next_input(total, step), inputs[:, step.start - first : step.stop - first])
        total = target.absorb(total, labels[:, step.start : step.stop], step)
    assert torch.equal(total, final)


def test_zero_rest_is_bit_zero(target: ResidualTarget, small_schedule: ScaleSchedule) -> None:
    first = next(target.quantize(target.initial(1, small_schedule), small_schedule))
    assert not first.bits.any()


def test_truncated_run_up_samples_its_last_scale(
    target: ResidualTarget, latent: torch.Tensor, small_schedule: ScaleSchedule
) -> None:
    full = list(target.quantize(latent, small_schedule))
    short = list(target.quantize(latent, small_schedule.truncate(2)))
    assert torch.equal(short[-1].latent, full[1].latent)
    inputs, labels, _ = target.labels(latent, small_schedule.truncate(1))
    assert (inputs.shape, labels.shape) == ((2, 0, 12), (2, 1, 12))


def test_self_correction_without_noise_is_teacher_forcing(
    target: ResidualTarget, latent: torch.Tensor, small_schedule: ScaleSchedule
) -> None:
    inputs, labels, _ = target.labels(latent, small_schedule)
    for strength, layers in ((0.0, 3), (0.5, 0)):
        noisy_inputs, noisy_labels, masks = target.self_correct(latent, small_schedule, strength, layers)
        assert torch.equal(noisy_inputs, inputs) and torch.equal(noisy_labels, labels)
        assert len(masks) == layers and not any(mask.any() for mask in masks)


def test_self_correction_draws_flips_and_repairs_them(target: ResidualTarget, small_schedule: ScaleSchedule) -> None:
    shape = (16, target.bits, *target.final_grid(small_schedule))
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs, labels, _ = target.labels(latent, small_schedule)
    rates = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        noisy_inputs, noisy_labels, masks = target.self_correct(latent, small_schedule, 0.3, 2, generator)
        rates.update(round(mask.float().mean().item(), 2) for mask in masks)
        assert max(mask.float().mean().item() for mask in masks) < 0.4
        # the first scale has no history, so its labels stay clean; later labels answer the flips
        assert torch.equal(noisy_labels[:, :1], labels[:, :1])
        again = target.self_correct(latent, small_schedule, 0.3, 2, torch.Generator().manual_seed(seed))
        assert torch.equal(again[0], noisy_inputs)
    assert len(rates) > 5
    assert not torch.equal(noisy_inputs, inputs) and not torch.equal(noisy_labels, labels)


def test_magnitudes_are_the_rests_behind_the_labels(
    target: ResidualTarget, latent: torch.Tensor, small_schedule: ScaleSchedule
) -> None:
    _, labels, flips = target.self_correct(latent, small_schedule, 0.3, 2, torch.Generator().manual_seed(3))
    forced = target.teacher_forcing(latent, small_schedule, flips)
    magnitudes = forced.magnitudes
    rests = [scale.residual.permute(0, 2, 3, 1) for scale in target.quantize(latent, small_schedule, flips)]
    signed = torch.cat([target.pack(rest) for rest in rests], dim=1)  # (B, L, D)
    assert torch.equal(forced.labels, labels) and torch.equal(magnitudes, signed.abs())
    assert magnitudes.shape == labels.shape and (magnitudes >= 0).all()
    torch.testing.assert_close(magnitudes * (labels.float() * 2 - 1), signed)
    assert not torch.equal(magnitudes, target.teacher_forcing(latent, small_schedule).magnitudes)


def test_bad_shapes(target: ResidualTarget, latent: torch.Tensor, small_schedule: ScaleSchedule) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 6, 8\)"):
        next(target.quantize(latent[..., :4], small_schedule))
    with pytest.raises(ValueError, match=r"expected \(B, 4, 12\)"):
        target.absorb(target.initial(2, small_schedule), torch.zeros(2, 4, 3), small_schedule.steps[1])
    with pytest.raises(ValueError, match="no probability"):
        target.self_correct(latent, small_schedule, strength=1.5)
