"""The bit loss against its definition; equality with published numbers is tested with the backbone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_schedule

from scaleweaver.train.losses import bit_loss


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 5, generator=generator)
    return logits, torch.randint(0, 2, (2, 30, 5), generator=generator).to(torch.uint8)


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """Logits of the values 0 and 1 of every bit, (bits, 2)."""
    return torch.stack((torch.zeros_like(logits), logits), dim=-1).flatten(0, -2)


@pytest.mark.parametrize("reweight", [True, False])
def test_equals_cross_entropy_over_two_classes(reweight):
    logits, labels = draw()
    classes = two_classes(logits)
    entropy = F.cross_entropy(classes, labels.flatten().long(), reduction="none").view(2, 30, 5).mean((0, 2))
    weights = torch.cat([torch.full((n,), n**-0.5 if reweight else 1.0) for n in (1, 4, 9, 16)])
    loss, per_scale, accuracy = bit_loss(logits, labels, tiny_schedule(), reweight)
    torch.testing.assert_close(loss, (entropy * weights).sum() / weights.sum())
    torch.testing.assert_close(per_scale, torch.stack([part.mean() for part in entropy.split([1, 4, 9, 16])]))
    right = (classes.argmax(-1) == labels.flatten()).float().view(2, 30, 5).mean((0, 2))
    torch.testing.assert_close(accuracy, torch.stack([part.mean() for part in right.split([1, 4, 9, 16])]))


def test_gradients_are_those_of_the_definition():
    logits, labels = draw()
    logits.requires_grad_()
    loss, per_scale, accuracy = bit_loss(logits, labels, tiny_schedule())
    loss.backward()
    weights = torch.cat([torch.full((n,), n**-0.5) for n in (1, 4, 9, 16)])
    want = (logits.detach().sigmoid() - labels) * (weights / weights.sum())[:, None] / (2 * 5)
    torch.testing.assert_close(logits.grad, want)
    assert per_scale.requires_grad and not accuracy.requires_grad


def test_gradients_of_a_head_with_two_classes_are_those_of_the_softmax():
    x, labels = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1)), draw()[1]
    heads = [torch.nn.Linear(8, 10) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    classes = heads[0](x)
    bit_loss(classes[..., 1::2] - classes[..., ::2], labels, tiny_schedule(), reweight=False)[0].backward()
    F.cross_entropy(heads[1](x).view(-1, 2), labels.flatten().long()).backward()
    for ours, theirs in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_extremes_stay_finite():
    _, labels = draw()
    sure = 400.0 * labels - 200.0
    loss, _, accuracy = bit_loss(sure, labels, tiny_schedule())
    assert loss == 0 and (accuracy == 1).all()
    loss, _, accuracy = bit_loss(-sure, labels, tiny_schedule())
    assert loss == pytest.approx(200.0) and (accuracy == 0).all()
    undecided = bit_loss(torch.zeros(2, 30, 5, dtype=torch.bfloat16), labels, tiny_schedule())[0]
    assert undecided == pytest.approx(math.log(2)) and undecided.dtype == torch.float32


def test_truncated_schedules_and_wrong_shapes():
    logits, labels = draw()
    _, per_scale, _ = bit_loss(logits[:, :5], labels[:, :5], tiny_schedule().truncate(2))
    assert per_scale.shape == (2,)
    with pytest.raises(ValueError, match="truncate"):
        bit_loss(logits[:, :5], labels[:, :5], tiny_schedule())
    with pytest.raises(ValueError, match="one per bit"):
        bit_loss(logits[..., :4], labels, tiny_schedule())


def test_magnitudes_weigh_bits_within_their_scale():
    logits, labels = draw()
    plain, per_scale, accuracy = bit_loss(logits, labels, tiny_schedule())
    even = bit_loss(logits, labels, tiny_schedule(), magnitudes=torch.full((2, 30, 5), 3.0))
    torch.testing.assert_close(even[0], plain)
    sizes = torch.rand(2, 30, 5, generator=torch.Generator().manual_seed(1))
    sizes[:, :, 0] = 0.0  # signs of nothing
    logits.requires_grad_()
    loss, weighed, same = bit_loss(logits, labels, tiny_schedule(), magnitudes=sizes)
    entropy = F.cross_entropy(two_classes(logits), labels.flatten().long(), reduction="none")
    wanted = [
        (e * m).sum() / m.sum()
        for e, m in zip(entropy.view(2, 30, 5).split([1, 4, 9, 16], 1), sizes.split([1, 4, 9, 16], 1), strict=True)
    ]
    torch.testing.assert_close(weighed, torch.stack(wanted))
    assert torch.equal(same, accuracy) and not torch.allclose(weighed, per_scale)
    loss.backward()
    assert (logits.grad[..., 0] == 0).all() and (logits.grad[..., 1:] != 0).all()
    nothing = bit_loss(logits.detach(), labels, tiny_schedule(), magnitudes=torch.zeros(2, 30, 5))[0]
    assert nothing == 0
