import pytest
import torch

from scaleweaver.sampling import BitwiseSampler, draw
from scaleweaver.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (3, 5)), (3, 5))
STEP = SCHEDULE.steps[1]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def logits(images: int = 2, bits: int = 8, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(images, STEP.n, bits, generator=torch.Generator().manual_seed(seed))


def two_classes(x: torch.Tensor) -> torch.Tensor:
    """Logits of the values 0 and 1, (..., N) -> (..., N, 2)."""
    return torch.stack((torch.zeros_like(x), x), dim=-1)


def test_bits_have_the_layout_of_their_logits():
    bits = BitwiseSampler().sample(logits(), STEP, generators(1, 2))
    assert bits.shape == (2, 15, 8) and bits.dtype == torch.uint8
    assert set(bits.unique().tolist()) == {0, 1}
    certain = torch.tensor([200.0, -200.0, 200.0]).expand(1, 15, 3)
    assert BitwiseSampler().sample(certain, STEP, generators(0))[0, 7].tolist() == [1, 0, 1]


def test_draw_equals_multinomial_of_one_image():
    p = two_classes(logits(1)).softmax(-1)
    ours = draw(p, generators(5))
    theirs = torch.multinomial(p.reshape(-1, 2), 1, generator=generators(5)[0])
    assert torch.equal(ours.reshape(-1), theirs.reshape(-1))


def test_bits_are_drawn_as_from_two_classes():
    x = logits(2, 64)
    ours = BitwiseSampler().sample(x, STEP, generators(5, 6))
    assert torch.equal(ours, draw(two_classes(x).softmax(-1), generators(5, 6)).to(torch.uint8))
    assert abs(float(ours.float().mean() - x.sigmoid().mean())) < 0.05


def test_frequencies_follow_the_probabilities():
    p = torch.tensor([0.1, 0.2, 0.7]).expand(1, 20_000, 3)
    counts = draw(p, generators(3)).flatten().bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, p[0, 0], atol=0.015, rtol=0)


def test_image_does_not_depend_on_its_batch():
    x = logits(3)
    together = BitwiseSampler(0.7, top_p=0.95).sample(x, STEP, generators(1, 2, 3))
    alone = BitwiseSampler(0.7, top_p=0.95).sample(x[1:2], STEP, generators(2))
    assert torch.equal(together[1:2], alone)


def test_top_k_one_takes_the_likelier_value_and_draws_nothing():
    x, g = logits(), generators(1, 2)
    before = g[0].get_state()
    bits = BitwiseSampler(top_k=1).sample(x, STEP, g)
    assert torch.equal(bits, (x > 0).to(torch.uint8))
    assert torch.equal(g[0].get_state(), before)


def test_top_k_two_is_off():
    plain = BitwiseSampler().sample(x := logits(), STEP, generators(1, 2))
    assert torch.equal(BitwiseSampler(top_k=900).sample(x, STEP, generators(1, 2)), plain)


def test_top_p_drops_exactly_the_rare_classes():
    x = logits(1, 64) * 2
    rare = two_classes(x).softmax(-1).amin(-1) <= 0.03
    likeliest = BitwiseSampler(top_k=1).sample(x, STEP, generators(0))
    plain = BitwiseSampler().sample(x, STEP, generators(9))
    cut = BitwiseSampler(top_p=0.97).sample(x, STEP, generators(9))
    assert torch.equal(cut[rare], likeliest[rare])
    assert torch.equal(cut[~rare], plain[~rare])
    assert (plain[rare] != likeliest[rare]).any()  # otherwise the cut would have had nothing to do


def test_temperature_per_scale():
    x = logits()
    assert torch.equal(BitwiseSampler([1.0, 0.5]).tempered(x, STEP), x / 0.5)
    cold = BitwiseSampler([9.0, 1e-6]).sample(x, STEP, generators(1, 2))
    assert torch.equal(cold, BitwiseSampler(top_k=1).sample(x, STEP, generators(1, 2)))
    with pytest.raises(ValueError, match="temperature has 3 values but there are 2 scales"):
        BitwiseSampler([1.0, 1.0, 1.0]).sample(x, STEP, generators(1, 2))


def test_low_precision_logits_are_sampled_in_float32():
    x = logits().bfloat16()
    expected = BitwiseSampler(0.3).sample(x.float(), STEP, generators(1, 2))
    assert torch.equal(BitwiseSampler(0.3).sample(x, STEP, generators(1, 2)), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.0},
        {"temperature": [1.0, -1.0]},
        {"temperature": float("nan")},
        {"temperature": []},
        {"temperature": None},
        {"top_k": -1},
        {"top_p": 1.5},
    ],
)
def test_settings_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"pass|finite"):
        BitwiseSampler(**arguments)


def test_one_generator_per_image():
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        BitwiseSampler().sample(logits(2), STEP, generators(1))
