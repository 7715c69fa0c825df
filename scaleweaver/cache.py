"""Keys and values of earlier scales, and which of them outlive a scale.

Keys arrive normalised, scaled and rotated, so a kept key never changes. Teacher forcing is a fresh cache that gets all
scales at once: nothing is kept then, as nobody reads the last scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleweaver.contracts import CachePolicy, Steps
from scaleweaver.kernels.interval_attention import KeySet, attend_ranges, interval_attention
from scaleweaver.masks import key_ranges
from scaleweaver.schedule import ScaleStep

_LAST = -1  # in place of a layer: the buffer that all layers share at the last scale


@dataclass(frozen=True)
class FullCache:
    """Keeps everything."""

    def commits(self, step: ScaleStep) -> bool:
        return True

    def queries(self, layer: int, step: ScaleStep) -> Tensor | None:
        return None

    def keep(self, layer: int, step: ScaleStep, tokens: int, scores: Tensor | None) -> Tensor | None:
        return None


@dataclass(frozen=True)
class NoCache(FullCache):
    """Keeps nothing: every scale sees itself alone."""

    def commits(self, step: ScaleStep) -> bool:
        return False


@dataclass(frozen=True)
class SlidingWindow(FullCache):
    """Keeps the newest `tokens` tokens of each layer."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a window of {self.tokens} tokens keeps nothing; pass 1 or more, or use NoCache")

    def keep(self, layer: int, step: ScaleStep, tokens: int, scores: Tensor | None) -> Tensor | None:
        if tokens <= self.tokens:
            return None
        return torch.arange(tokens - self.tokens, tokens)[None, None]  # (1, 1, K), the same for all rows and heads


class KVCache:
    """Per layer, keys and values (R, H, T, D) of the tokens that later scales may see."""

    def __init__(self, policy: CachePolicy | None = None) -> None:
        self.policy: CachePolicy = FullCache() if policy is None else policy
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # (R, H, capacity, D), written in place

    def room(self, layer: int, steps: Steps, projection: Tensor, heads: int) -> tuple[Tensor, Tensor] | None:
        """Memory (R, H, L, D) for keys and values of `steps` behind this layer's history, so that `attend` copies
        nothing; None where gradients are asked for or a policy thins it out. `projection` (R, L, 3C) has their dtype.
        """
        # policies that thin out a layer make new tensors of what they keep: to them a buffer would be waste
        if torch.is_grad_enabled() or type(self.policy) is not FullCache:
            return None
        rows, tokens, width = projection.shape
        history, schedule = self.tokens(layer), steps[0].schedule
        # nobody reads the last scale again: all layers lay it out in one buffer, behind a copy of their history
        place, kept = (_LAST, schedule.length) if steps[-1].is_last else (layer, schedule.steps[-1].start)
        shape = (rows, heads, max(kept, history + tokens), width // (3 * heads))
        buffers = self._buffers.get(place)
        if buffers is None or buffers[0].shape != shape or buffers[0].dtype != projection.dtype:
            buffers = self._buffers[place] = (projection.new_empty(shape), projection.new_empty(shape))
        for past, buffer in zip(self._layers.get(layer, ()), buffers, strict=False):
            if past.data_ptr() != buffer.data_ptr():
                buffer[:, :, :history] = past
        return buffers[0][:, :, history : history + tokens], buffers[1][:, :, history : history + tokens]

    def attend(
        self, layer: int, steps: Steps, q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q (R, H, L, D) to this layer's history and to k, v (R, H, L, D) of `steps` themselves.

        Returns the output (R, H, L, D) and lse (R, H, L) or None, then keeps k and v as the policy says.
        """
        history = self.tokens(layer)
        k, v = self._behind_history(layer, steps, k.to(v.dtype), v)  # (R, H, history + L, D)
        ranges = key_ranges(steps, "block_causal", history) if len(steps) > 1 else None
        result = attend_ranges(q.to(v.dtype), k, v, ranges, return_lse=return_lse)
        if not steps[-1].is_last:
            self._commit(layer, steps, q, k, v, history)
        return result

    def attend_both(
        self, layer: int, steps: Steps, q: Tensor, k: Tensor, v: Tensor, second: KeySet, return_lse: bool = False
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """`attend`, and (out, lse) of attention to a second key set with a softmax of its own, in one launch."""
        history = self.tokens(layer)
        k, v = self._behind_history(layer, steps, k.to(v.dtype), v)  # (R, H, history + L, D)
        own = KeySet(k, v, key_ranges(steps, "block_causal", history))
        out, lse = interval_attention(q.to(v.dtype), own, second)  # (R, L, 2, H, D), (R, 2, H, L)
        if not steps[-1].is_last:
            self._commit(layer, steps, q, k, v, history)
        (own_out, own_lse), read = ((out[:, :, i].transpose(1, 2), lse[:, i]) for i in (0, 1))  # (R, H, L, D) each
        return (own_out, own_lse if return_lse else None), read

    def _behind_history(self, layer: int, steps: Steps, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.tokens(layer):
            return k, v
        past_k, past_v = self._layers[layer]
        history, end = past_k.shape[2], past_k.shape[2] + k.shape[2]
        buffers = self._buffers.get(_LAST if steps[-1].is_last else layer)
        if buffers is not None and buffers[0][:, :, history:end].data_ptr() == k.data_ptr():  # written there already
            return buffers[0][:, :, :end], buffers[1][:, :, :end]  # (R, H, history + L, D)
        return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)  # (R, H, history + L, D)

    def _commit(self, layer: int, steps: Steps, q: Tensor, k: Tensor, v: Tensor, history: int) -> None:
        commits = [self.policy.commits(step) for step in steps]
        if not any(commits):
            return
        step = steps[-1]
        observed = self.policy.queries(layer, step)
        scores = None
        if observed is not None:  # positions within the newest scale, which sees every key
            queries = q[:, :, -step.n :][:, :, observed.to(q.device)]  # (R, H, W, D)
            scores = (queries.float() @ k.float().transpose(-2, -1)).softmax(-1).sum(2)  # (R, H, T)
        if not all(commits):
            spans = zip(commits, (step.n for step in steps), strict=True)
            kept = torch.tensor([True] * history + [flag for flag, n in spans for _ in range(n)], device=k.device)
            k, v = k[:, :, kept], v[:, :, kept]  # (R, H, T, D)
            scores = None if scores is None else scores[:, :, kept]
        index = self.policy.keep(layer, step, k.shape[2], scores)
        if index is not None:
            index = index.to(k.device)[..., None].expand(*k.shape[:2], -1, k.shape[3])  # (R, H, K, D)
            k, v = k.gather(2, index), v.gather(2, index)  # (R, H, K, D)
        self._layers[layer] = (k, v)

    def select_rows(self, rows: Tensor) -> None:
        """Go on with other rows: rows (R',) int64 indexes the present ones."""
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}
        self._buffers.clear()

    def drop_layers(self, layers: Iterable[int]) -> None:
        """Forget the history of these layers."""
        for layer in layers:
            self._layers.pop(layer, None)
            self._buffers.pop(layer, None)

    def tokens(self, layer: int) -> int:
        """Number of tokens this layer remembers."""
        return self._layers[layer][0].shape[2] if layer in self._layers else 0

    def history(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (R, H, T, D) that this layer remembers."""
        return self._layers.get(layer)

    def resume(self, layer: int, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Go on behind the first `tokens` of keys and values (R, H, capacity, D), whose rest is room for more."""
        self._buffers[layer] = (keys, values)
        self._layers.pop(layer, None)
        if tokens:
            self._layers[layer] = (keys[:, :, :tokens], values[:, :, :tokens])

    def nbytes(self) -> int:
        """Memory of all keys and values in bytes, without room that is kept for those of later scales."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    def reset(self) -> None:
        """Forget everything."""
        self._layers.clear()
        self._buffers.clear()
