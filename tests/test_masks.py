"""Key ranges and dense masks of several scales at once."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import tiny_schedule

from scaleweaver.masks import LARGEST_KEPT, dense, row_ranges, scale_mask
from scaleweaver.schedule import infinity_schedule


def test_block_causal_rows_see_up_to_their_own_scale():
    steps = tiny_schedule().steps
    start, end = row_ranges(steps, "block_causal")
    assert start.dtype == end.dtype == torch.int32 and len(start) == 30
    assert not start.any()
    assert end.tolist() == [1] + [5] * 4 + [14] * 9 + [30] * 16


def test_same_scale_rows_see_their_own_scale_alone():
    start, end = row_ranges(tiny_schedule().steps[:3], "same_scale")
    assert start.tolist() == [0] + [1] * 4 + [5] * 9
    assert end.tolist() == [1] + [5] * 4 + [14] * 9


def test_history_shifts_the_ranges():
    steps = tiny_schedule().steps[1:3]
    start, end = row_ranges(steps, "block_causal", history=7)
    assert not start.any() and end.tolist() == [11] * 4 + [20] * 9
    start, end = row_ranges(steps, "same_scale", history=7)
    assert start.tolist() == [7] * 4 + [11] * 9 and end.tolist() == [11] * 4 + [20] * 9


def test_dense_is_the_definition_of_the_ranges():
    start, end = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 2, 5])
    mask = dense(start, end, 5)
    want = [[start[i] <= j < end[i] for j in range(5)] for i in range(4)]
    assert torch.equal(mask, torch.tensor(want))
    assert not mask[2].any()


@pytest.mark.parametrize("kind", ["block_causal", "same_scale"])
def test_masks_are_remembered_and_fit_for_training(kind):
    steps = tiny_schedule().steps
    with torch.inference_mode():
        mask = scale_mask(steps, kind)
    assert mask is scale_mask(tiny_schedule().steps, kind) and not mask.is_inference()
    assert mask.shape == (30, 30) and bool(mask.any(1).all())
    assert scale_mask(steps[1:], kind, history=2).shape == (29, 31)


def test_a_large_mask_is_not_kept_in_memory():
    schedule = infinity_schedule("1.0", "0.60M")
    mask = scale_mask(schedule.steps, "same_scale")
    assert mask.nbytes == schedule.length**2 > LARGEST_KEPT
    gone = weakref.ref(mask)
    del mask
    assert gone() is None


def test_unknown_kind():
    with pytest.raises(ValueError, match="block_causal"):
        row_ranges(tiny_schedule().steps, "causal")  # type: ignore[arg-type]
