from itertools import permutations

import numpy as np
import pytest
import torch

from scaleweaver.guidance import ClassifierFreeGuidance, ControlGuidance, per_scale
from scaleweaver.schedule import ScaleSchedule

STEPS = ScaleSchedule(((1, 1), (2, 2), (3, 3)), (3, 3)).steps


def logits(branches: int) -> torch.Tensor:
    return torch.randn(branches * 2, 4, 6, generator=torch.Generator().manual_seed(branches))


def test_classifier_free_guidance_is_an_extrapolation():
    text, null = (x := logits(2)).chunk(2)
    for scale in (0.0, 0.5, 3.0, -1.0):
        mixed = ClassifierFreeGuidance(scale, 3).combine(x, STEPS[1])
        torch.testing.assert_close(mixed, null + scale * (text - null))


def test_scale_one_is_off_and_returns_the_text_branch_untouched():
    guidance = ClassifierFreeGuidance([2.0, 1.0, 3.0], 3)
    assert guidance.branches == 2 and guidance.alive(STEPS[1]) == 2
    assert torch.equal(guidance.combine(x := logits(2), STEPS[1]), x[:2])
    off = ClassifierFreeGuidance(1.0, 3)
    assert off.branches == 1
    assert torch.equal(off.combine(x := logits(1), STEPS[0]), x)


def test_null_branch_dies_with_its_last_weight():
    guidance = ClassifierFreeGuidance([3.0, 2.0, 1.0], 3)
    assert [guidance.alive(step) for step in STEPS] == [2, 2, 1]
    assert torch.equal(guidance.combine(x := logits(1), STEPS[2]), x)


def test_guidance_inside_the_network_mixes_after_one_layer():
    guidance = ClassifierFreeGuidance([3.0, 1.0, 2.0], 3, insert_after=1)
    text, null = (x := logits(2)).chunk(2)
    assert guidance.mix(0, x, STEPS[0]) is x
    mixed = guidance.mix(1, x, STEPS[0])
    torch.testing.assert_close(mixed, (3 * text - 2 * null).repeat(2, 1, 1))
    assert torch.equal(guidance.mix(1, x, STEPS[1]), text.repeat(2, 1, 1))
    assert torch.equal(guidance.combine(x, STEPS[0]), text)


def test_guidance_on_logits_never_mixes_inside():
    assert ClassifierFreeGuidance(3.0, 3).mix(1, x := logits(2), STEPS[0]) is x
    assert ControlGuidance(3.0, [2.0], 3).mix(1, x := logits(3), STEPS[0]) is x


@pytest.mark.parametrize("text_scale, control_scale", [(3.0, 2.0), (1.0, 4.0), (2.0, 2.0), (4.0, 0.0)])
def test_control_guidance_formula(text_scale, control_scale):
    both, control, null = (x := logits(3)).chunk(3)
    guidance = ControlGuidance(text_scale, [control_scale] * 2, 3)
    expected = null + control_scale * (control - null) + text_scale * (both - control)
    torch.testing.assert_close(guidance.combine(x, STEPS[0]), expected)
    assert guidance.branches == 3
    assert guidance.sees_control(0) == guidance.sees_control(1) == (True, True, False)
    # the very sum of three terms, whatever else this class can do
    weights = (text_scale, control_scale - text_scale, 1 - control_scale)
    terms = [part * weight for part, weight in zip((both, control, null), weights, strict=True) if weight]
    assert torch.equal(guidance.combine(x, STEPS[0]), sum(terms[1:], start=terms[0]))


def test_several_weights_formula():
    # the first two share a weight; 1 has no branch of its own; those that are needed longest come first
    scales = [[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], 1.0, [3.0, 0.5, 4.0]]
    guidance = ControlGuidance([3.0, 2.0, 1.0], scales, 3)
    assert guidance.branches == 5 and [guidance.alive(step) for step in STEPS] == [5, 5, 4]
    assert guidance.sees_control(0) == guidance.sees_control(1) == (True, True, False, False, True)
    assert guidance.sees_control(2) == (True, True, False, False, False)
    assert guidance.sees_control(3) == (True, True, False, True, False)
    both, control, null, last, first = (x := logits(5)).chunk(5)
    for step, text, one, other in ((STEPS[0], 3.0, 2.0, 3.0), (STEPS[1], 2.0, 2.0, 0.5)):
        expected = control + text * (both - control) + (one - 1) * (first - null) + (other - 1) * (last - null)
        torch.testing.assert_close(guidance.combine(x, step), expected)
    torch.testing.assert_close(guidance.combine(x[:8], STEPS[2]), both + 3 * (last - null))


def test_order_of_the_controls_changes_nothing():
    scales = [2.0, [3.0, 1.0, 1.0], 0.5]
    x = logits(6)
    drawn = [ControlGuidance(3.0, order, 3).combine(x, STEPS[0]) for order in permutations(scales)]
    assert all(torch.equal(one, drawn[0]) for one in drawn)


def test_without_controls_or_with_weights_of_one_it_is_text_guidance():
    for scales in ([], [1.0, [1.0] * 3]):
        guidance = ControlGuidance(3.0, scales, 3)
        assert guidance.branches == 2
        assert torch.equal(
            guidance.combine(x := logits(2), STEPS[0]), ClassifierFreeGuidance(3.0, 3).combine(x, STEPS[0])
        )


def test_control_guidance_one_is_classifier_free_guidance():
    guidance, plain = ControlGuidance(3.0, [1.0], 3), ClassifierFreeGuidance(3.0, 3)
    assert guidance.branches == 2 and guidance.sees_control(0) == (True, True) == plain.sees_control(0)
    assert torch.equal(guidance.combine(x := logits(2), STEPS[0]), plain.combine(x, STEPS[0]))
    assert ControlGuidance(1.0, [1.0], 3).branches == 1


def test_control_guidance_drops_branches_one_by_one():
    guidance = ControlGuidance([3.0, 3.0, 1.0], [[2.0, 1.0, 1.0]], 3)
    assert [guidance.alive(step) for step in STEPS] == [3, 2, 1]
    assert torch.equal(guidance.combine(x := logits(1), STEPS[2]), x)


def test_per_scale_lists():
    assert per_scale(2, 3, "x") == (2.0, 2.0, 2.0)
    assert per_scale([1, 2, 3], 3, "x") == (1.0, 2.0, 3.0)
    assert per_scale(torch.tensor([1.0, 2.0]).numpy(), 2, "x") == (1.0, 2.0)
    for single in (np.float32(2), np.array(2), torch.tensor(2.0), torch.tensor(2, dtype=torch.bfloat16)):
        assert per_scale(single, 2, "x") == (2.0, 2.0)
    assert per_scale(torch.tensor([1.0, 2.0], requires_grad=True), 2, "x") == (1.0, 2.0)
    with pytest.raises(ValueError, match="guidance_scale has 2 values but there are 3 scales"):
        ClassifierFreeGuidance([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="finite"):
        per_scale(float("nan"), 3, "x")
    for value in (None, "strong", [1.0, None, 2.0], np.ones((3, 3)), np.array(None)):
        with pytest.raises(ValueError, match="pass one number or a list of 3"):
            per_scale(value, 3, "x")
    with pytest.raises(ValueError, match="insert_after is -1"):
        ClassifierFreeGuidance(2.0, 3, insert_after=-1)
    with pytest.raises(ValueError, match="control_guidance_scale has 3 values but there are 2 scales"):
        ControlGuidance([1.0, 2.0], [[1.0, 2.0, 3.0]], 2)
