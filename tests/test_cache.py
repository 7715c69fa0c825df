"""What the cache attends to, keeps and forgets."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_backbone, tiny_schedule, tiny_text
from torch.testing import assert_close

from scaleweaver.cache import FullCache, KVCache, NoCache, SlidingWindow
from scaleweaver.kernels.attention import attend_reference

R, H, D = 2, 3, 8
STEPS = tiny_schedule().steps


def qkv(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, R, H, n, D, generator=torch.Generator().manual_seed(seed)).unbind(0)


def fill(cache: KVCache, layer: int = 0, scales: int = 3) -> list[tuple[torch.Tensor, ...]]:
    given = [qkv(step.n, step.index) for step in STEPS[:scales]]
    for step, (q, k, v) in zip(STEPS, given, strict=False):
        cache.attend(layer, (step,), q, k, v)
    return given


def test_a_scale_sees_all_earlier_ones_and_itself():
    cache = KVCache()
    given = fill(cache)
    q, k, v = qkv(16, 9)
    out, lse = cache.attend(0, STEPS[3:], q, k, v, return_lse=True)
    keys = torch.cat([*(k for _, k, _ in given), k], 2)
    values = torch.cat([*(v for _, _, v in given), v], 2)
    want, want_lse = attend_reference(q, keys, values)
    assert_close(out, want)
    assert_close(lse, want_lse)


def test_the_last_scale_is_never_kept():
    cache = KVCache()
    fill(cache, scales=4)
    assert cache.tokens(0) == 14
    fresh = KVCache()
    fresh.attend(0, STEPS, *qkv(30))
    assert fresh.tokens(0) == 0 and fresh.nbytes() == 0


def test_several_scales_at_once_equal_one_by_one():
    one_by_one, at_once = KVCache(), KVCache()
    given = fill(one_by_one)
    fill(at_once, scales=1)
    q, k, v = (torch.cat([given[1][i], given[2][i]], 2) for i in range(3))
    out, _ = at_once.attend(0, STEPS[1:3], q, k, v)
    reference = KVCache()
    fill(reference, scales=1)
    first, _ = reference.attend(0, STEPS[1:2], *given[1])
    second, _ = reference.attend(0, STEPS[2:3], *given[2])
    assert_close(out, torch.cat([first, second], 2))
    assert_close(*(cache.attend(0, STEPS[3:], *qkv(16, 9))[0] for cache in (one_by_one, at_once)))


def test_keys_take_the_values_dtype():
    cache = KVCache()
    q, k, v = qkv(1)
    out, _ = cache.attend(0, STEPS[:1], q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert cache.nbytes() == 2 * R * H * D * 2


@torch.inference_mode()
def test_keys_written_in_place_serve_like_copies():
    copied, placed = KVCache(), KVCache()
    for step in STEPS:
        for layer in (0, 1):
            q, k, v = qkv(step.n, 10 * layer + step.index)
            want, _ = copied.attend(layer, (step,), q, k, v)
            before = placed._layers[layer][0] if step.index == 1 else None
            room = placed.room(layer, (step,), torch.empty(R, step.n, 3 * H * D), H)
            got, _ = placed.attend(layer, (step,), q, room[0].copy_(k), room[1].copy_(v))
            assert torch.equal(got, want)
            if before is not None:  # the history has not moved
                assert placed._layers[layer][0].data_ptr() == before.data_ptr()
        assert placed.nbytes() == copied.nbytes()
        if step.index == 1:
            for cache in (copied, placed):
                cache.select_rows(torch.tensor([1, 0]))
    placed.reset()
    assert placed.nbytes() == 0


def test_room_is_for_drawing_with_policies_that_keep_everything():
    projection = torch.empty(R, 1, 3 * H * D)
    with torch.no_grad():
        assert KVCache(SlidingWindow(9)).room(0, STEPS[:1], projection, H) is None
        assert KVCache().room(0, STEPS[:1], projection, H)[0].shape == (R, H, 1, D)
    assert KVCache().room(0, STEPS[:1], projection, H) is None  # a gradient would be asked for


def test_no_cache_sees_the_scale_alone():
    cache = KVCache(NoCache())
    fill(cache)
    q, k, v = qkv(16, 9)
    assert_close(cache.attend(0, STEPS[3:], q, k, v)[0], attend_reference(q, k, v)[0])
    assert cache.tokens(0) == 0


def test_a_window_keeps_the_newest_tokens():
    cache = KVCache(SlidingWindow(10))
    given = fill(cache)
    assert cache.tokens(0) == 10
    q, k, v = qkv(16, 9)
    keys, values = (torch.cat([given[1][i][:, :, 3:], given[2][i], (q, k, v)[i]], 2) for i in (1, 2))
    assert_close(cache.attend(0, STEPS[3:], q, k, v)[0], attend_reference(q, keys, values)[0])
    with pytest.raises(ValueError, match="NoCache"):
        SlidingWindow(0)


@torch.inference_mode()
def test_a_window_wide_enough_changes_nothing():
    model, text = tiny_backbone(), tiny_text()
    logits = []
    for policy in (FullCache(), SlidingWindow(30), SlidingWindow(9)):
        cache, context = KVCache(policy), model.encode_text(text)
        for step in STEPS:
            inputs = torch.randn(R, step.n, 12, generator=torch.Generator().manual_seed(step.index))
            out = model(inputs if step.index else None, (step,), context, cache)
        logits.append(out)
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


class Observer(FullCache):
    """Watches two queries and keeps the tokens they look at most, another choice in every head."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def queries(self, layer, step):
        return torch.tensor([0, step.n - 1])

    def keep(self, layer, step, tokens, scores):
        self.scores.append(scores)
        return scores.topk(min(3, tokens)).indices.sort().values


def test_a_policy_scores_and_selects_tokens():
    policy = Observer()
    cache = KVCache(policy)
    q, k, v = (torch.cat([qkv(n, n)[i] for n in (1, 4)], 2) for i in range(3))
    cache.attend(0, STEPS[:2], q, k, v)
    scores = policy.scores[0]
    want = (q[:, :, [1, 4]] @ k.transpose(-2, -1)).softmax(-1).sum(2)
    assert_close(scores, want)
    assert_close(scores.sum(-1), torch.full((R, H), 2.0))
    assert cache.tokens(0) == 3
    index = want.topk(3).indices.sort().values[..., None].expand(-1, -1, -1, D)
    q2, k2, v2 = qkv(9, 5)
    keys, values = torch.cat([k.gather(2, index), k2], 2), torch.cat([v.gather(2, index), v2], 2)
    assert_close(cache.attend(0, STEPS[2:3], q2, k2, v2)[0], attend_reference(q2, keys, values)[0])


class OnlyCoarse(FullCache):
    def commits(self, step):
        return step.index < 1


def test_a_policy_may_keep_some_of_several_scales():
    cache = KVCache(OnlyCoarse())
    q, k, v = qkv(5)
    cache.attend(0, STEPS[:2], q, k, v)
    assert cache.tokens(0) == 1
    q2, k2, v2 = qkv(9, 5)
    keys, values = torch.cat([k[:, :, :1], k2], 2), torch.cat([v[:, :, :1], v2], 2)
    assert_close(cache.attend(0, STEPS[2:3], q2, k2, v2)[0], attend_reference(q2, keys, values)[0])


def test_rows_and_layers():
    cache = KVCache()
    fill(cache, layer=0)
    fill(cache, layer=4)
    size = 2 * R * H * 14 * D * 4
    assert cache.nbytes() == 2 * size
    q, k, v = qkv(16, 9)
    full, _ = cache.attend(0, STEPS[3:], q, k, v)
    cache.select_rows(torch.tensor([1]))
    assert_close(cache.attend(0, STEPS[3:], q[1:], k[1:], v[1:])[0], full[1:])
    assert cache.nbytes() == size
    cache.drop_layers({0, 7})
    assert cache.tokens(0) == 0 and cache.tokens(4) == 14 and cache.nbytes() == size // 2
    cache.reset()
    assert cache.nbytes() == 0
