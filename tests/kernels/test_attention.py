"""Attention against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from scaleweaver.kernels.attention import attend, attend_reference, merge


def draw(rows: int, length: int, keys: int, key_rows: int | None = None, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * 1000 + keys)
    shapes = [(rows, 2, length, 16), (key_rows or rows, 2, keys, 16), (key_rows or rows, 2, keys, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def formula(q, k, v, mask=None, scale=1.0):
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("rhld,rhkd->rhlk", q, k.expand(len(q), -1, -1, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("rhlk,rhkd->rhld", weights, v.expand(len(q), -1, -1, -1)), scores.logsumexp(-1)


@pytest.mark.parametrize("length, keys", [(1, 1), (1, 123), (123, 7), (130, 130)])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("key_rows", [3, 1])
def test_equals_the_formula(length, keys, return_lse, key_rows):
    q, k, v = draw(3, length, keys, key_rows)
    out, lse = attend(q, k, v, scale=0.3, return_lse=return_lse)
    want, want_lse = formula(q, k, v, scale=0.3)
    assert_close(out.double(), want, atol=1e-5, rtol=0)
    assert (lse is not None) == return_lse
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(9, 11), (3, 1, 9, 11), (3, 1, 1, 11)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_masks_and_rows_that_see_nothing(shape, return_lse):
    q, k, v = draw(3, 9, 11)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0, :] = False
    out, lse = attend(q, k, v, mask=mask, return_lse=return_lse)
    want, want_lse = formula(q, k, v, mask)
    assert_close(out.double(), want, atol=1e-5, rtol=0)
    assert (out[:, :, 0] == 0).all()
    if lse is not None:
        assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)
        assert (lse[:, :, 0] == -torch.inf).all()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradients_equal_the_formulas(return_lse, dtype, tolerance):
    given = [t.requires_grad_() for t in draw(2, 13, 17, dtype=dtype)]
    mask = torch.ones(13, 17, dtype=torch.bool).tril(4)
    mask[0] = False
    out, lse = attend(*given, mask=mask, return_lse=return_lse)
    (out.float().square().sum() + (0 if lse is None else lse[:, :, 1:].sum())).backward()
    exact = [t.detach().double().requires_grad_() for t in given]
    want, want_lse = formula(*exact, mask)
    (want.square().sum() + (want_lse[:, :, 1:].sum() if return_lse else 0)).backward()
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.isfinite().all()
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < tolerance


def test_scores_stay_float32_under_autocast():
    q, k, v = (t.requires_grad_() for t in draw(2, 13, 17, dtype=torch.bfloat16))
    sharp = (q * 20, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [attend(*sharp)[0], attend(*sharp, return_lse=True)[0]]
    for out in outs:
        assert (out.double() - formula(*sharp)[0]).abs().max() < 2e-2


def test_two_key_sets_merge_into_one():
    q, k, v = draw(2, 9, 12)
    halves = [attend_reference(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 5), slice(5, 12))]
    out, lse = merge(*halves[0], *halves[1])
    want, want_lse = attend_reference(q, k, v)
    assert_close(out, want)
    assert_close(lse, want_lse)
    nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert_close(merge(*halves[0], *nothing)[0], halves[0][0])
    assert_close(merge(*nothing, *nothing)[0], nothing[0])
