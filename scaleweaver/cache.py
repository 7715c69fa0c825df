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
from scaleweaver.kernels.attention import attend
from scaleweaver.masks import scale_mask
from scaleweaver.schedule import ScaleStep


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

    def attend(
        self, layer: int, steps: Steps, q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q (R, H, L, D) to this layer's history and to k, v (R, H, L, D) of `steps` themselves.

        Returns the output (R, H, L, D) and lse (R, H, L) or None, then keeps k and v as the policy says.
        """
        k = k.to(v.dtype)
        history = self.tokens(layer)
        if history:
            past_k, past_v = self._layers[layer]
            k = torch.cat((past_k, k), dim=2)  # (R, H, history + L, D)
            v = torch.cat((past_v, v), dim=2)  # (R, H, history + L, D)
        mask = scale_mask(steps, "block_causal", history, q.device) if len(steps) > 1 else None
        result = attend(q.to(v.dtype), k, v, mask=mask, return_lse=return_lse)
        if not steps[-1].is_last:
            self._commit(layer, steps, q, k, v, history)
        return result

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

    def drop_layers(self, layers: Iterable[int]) -> None:
        """Forget the history of these layers."""
        for layer in layers:
            self._layers.pop(layer, None)

    def tokens(self, layer: int) -> int:
        """Number of tokens this layer remembers."""
        return self._layers[layer][0].shape[2] if layer in self._layers else 0

    def nbytes(self) -> int:
        """Memory of all keys and values in bytes."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)

    def reset(self) -> None:
        """Forget everything."""
        self._layers.clear()
