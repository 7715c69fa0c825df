"""The parts of a text-conditioned next-scale transformer block.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431).
The residual stream, norms, attention scales and RoPE stay float32 whatever the dtype of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaleweaver.cache import KVCache
from scaleweaver.contracts import Injector, Steps, TextContext
from scaleweaver.kernels.attention import attend
from scaleweaver.kernels.gate_norm import gate_norm, modulate
from scaleweaver.kernels.qkv_rope import Rope, qkv_rope
from scaleweaver.precision import fuses_linear

Room = Callable[[Tensor, int], tuple[Tensor, Tensor] | None]  # (projection, heads) -> where keys and values go


class SelfAttention(nn.Module):
    """Cosine attention: unit queries and keys, one learned temperature per head, no bias on keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4)))
        self.proj = nn.Linear(width, width)

    def project(self, y: Tensor, rope: Rope, room: Room | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y (R, L, C) -> q, k, v (R, H, L, D); q and k normalised, q scaled, both rotated.

        `room` may offer memory for k and v, `KVCache.room` of this layer.
        """
        qkv = self.qkv(y.to(self.q_bias.dtype))  # (R, L, 3C)
        into = None if room is None else room(qkv, self.heads)
        return qkv_rope(qkv, self.q_bias, self.v_bias, self.log_scale, rope, into=into)  # (R, H, L, D)

    def output(self, o: Tensor) -> Tensor:
        """Attention result (R, H, L, D) -> (R, L, C)."""
        return self.proj(o.transpose(1, 2).flatten(2))  # (R, L, C)


class CrossAttention(nn.Module):
    """Attention of image tokens to the prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_values(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Packed prompt tokens (sum of lengths, C) -> k, v of the same shape."""
        k, v = self.kv(sequence).chunk(2, dim=-1)  # (sum, C)
        return k, v + self.v_bias.to(v.dtype)

    def forward(self, y: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """y (R, L, C), k and v (R, H, P, D), mask (R, 1, 1, P) -> (R, L, C)."""
        q = self.q(y.to(self.v_bias.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, H, L, D)
        o, _ = attend(q, k, v, mask=mask, scale=q.shape[-1] ** -0.5)  # (R, H, L, D)
        return self.proj(o.transpose(1, 2).flatten(2))  # (R, L, C)


class FeedForward(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(_linear_gelu(self.fc1, y.to(self.fc1.bias.dtype)))


def _linear_gelu(layer: Any, y: Tensor) -> Tensor:
    if not fuses_gelu(layer, y):
        return F.gelu(layer(y), approximate="tanh")  # (R, L, 4C)
    plain = _without_lora(layer)
    # oneDNN applies the function to sums that it still holds, and the widest tensor of a block is passed over once
    fused: Tensor = torch.ops.mkldnn._linear_pointwise(y, plain.weight, plain.bias, "gelu", [], "tanh")  # (R, L, 4C)
    return fused


def fuses_gelu(layer: Any, y: Tensor) -> bool:
    """Whether a feed-forward's first layer and its GELU are one kernel for such a y."""
    layer = _without_lora(layer)
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter  # neither LoRA nor quantised
    watched = bool(layer._forward_hooks or layer._forward_pre_hooks) or hasattr(layer, "_hf_hook")  # as offloading does
    return plain and not watched and fuses_linear(y) and y.dtype == layer.weight.dtype


def _without_lora(layer: Any) -> Any:
    """What a LoRA wraps, where no adapter is on."""
    return layer.get_base_layer() if getattr(layer, "active_adapters", None) == [] else layer


class TextPool(nn.Module):
    """Attentive pooling of a prompt: one learned query per head, no query projection."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, features: Tensor, padding: Padding) -> Tensor:
        """Packed features (sum of lengths, T) -> (R, C)."""
        k, v = self.kv(features).chunk(2, dim=-1)  # (sum, C)
        heads = self.query.shape[1]
        k = padding.heads(k, heads)  # (R, H, P, D)
        v = padding.heads(v + self.v_bias.to(v.dtype), heads)  # (R, H, P, D)
        q = self.query.to(v.dtype).unsqueeze(2).expand(len(k), -1, -1, -1)  # (R, H, 1, D)
        o, _ = attend(q, k, v, mask=padding.mask, scale=q.shape[-1] ** -0.5)  # (R, H, 1, D)
        return self.proj(o.flatten(1))  # (R, C)


class Padding:
    """From packed rows of several lengths to a rectangle with zeros, and the mask of what is real."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.rows, self.longest = len(lengths), max(lengths)
        self.mask: Tensor | None = None
        if min(lengths) < self.longest:
            real = torch.arange(self.longest) < torch.tensor(lengths)[:, None]  # (R, P)
            self._index = real.flatten().nonzero()[:, 0].to(device)  # (sum,)
            self.mask = real[:, None, None].to(device)  # (R, 1, 1, P)

    def heads(self, packed: Tensor, heads: int) -> Tensor:
        """(sum of lengths, C) -> (R, H, P, D)."""
        if self.mask is not None:
            packed = packed.new_zeros(self.rows * self.longest, packed.shape[1]).index_copy(0, self._index, packed)
        return packed.view(self.rows, self.longest, heads, -1).transpose(1, 2)  # (R, H, P, D)


class Block(nn.Module):
    """Self-attention and feed-forward under shared AdaLN, an ungated cross-attention between them."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-6, drop_path: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.drop_path = drop_path
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, width))
        self.attn = SelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width, heads)
        self.ffn = FeedForward(width, hidden)

    def gates(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shared AdaLN output (R, 1, 6, C) -> gamma1, gamma2, scale1, scale2, shift1, shift2, each (R, 1, C)."""
        return (modulation + self.modulation).unbind(2)

    def forward(
        self,
        x: Tensor,
        layer: int,
        steps: Steps,
        rope: Rope,
        text: TextContext,
        cache: KVCache,
        injectors: Sequence[Injector] = (),
    ) -> Tensor:
        """x (R, L, C) float32 -> the same shape; `layer` names this block to the cache and the injectors."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.gates(text.modulation)
        y = modulate(x, scale1, shift1, self.eps, dtype=self.attn.q_bias.dtype)  # (R, L, C)
        q, k, v = self.attn.project(y, rope, partial(cache.room, layer, steps))  # (R, H, L, D)
        wants_lse = any(injector.needs_lse(layer) for injector in injectors)
        offered = injectors[0].keys(layer, steps, q) if injectors else None
        if offered is None:
            (attended, lse), read = cache.attend(layer, steps, q, k, v, return_lse=wants_lse), None  # (R, H, L, D)
        else:
            (attended, lse), read = cache.attend_both(layer, steps, q, k, v, offered, return_lse=wants_lse)
        inside, outside = [], []
        for injector in injectors:
            injection = injector.inject(layer, steps, q, attended, lse, read if injector is injectors[0] else None)
            attended, lse = injection.attended, lse if injection.lse is None else injection.lse
            inside += [] if injection.before_gate is None else [injection.before_gate]
            outside += [] if injection.after_gate is None else [injection.after_gate]
        norm, gate = self.cross_norm, self._drop(gamma1)
        branch = sum(inside, self.attn.output(attended))  # (R, L, C)
        x, y = gate_norm(
            x, branch, gate, norm.weight, norm.bias,
            eps=norm.eps, affine=True, terms=outside, dtype=self.cross.v_bias.dtype,
        )  # fmt: skip
        branch = self.cross(y, text.keys[layer], text.values[layer], text.mask)
        x, y = gate_norm(x, branch, None, scale2, shift2, eps=self.eps, dtype=self.ffn.fc1.bias.dtype)
        return torch.addcmul(x, self._drop(gamma2), self.ffn(y))

    def _drop(self, gamma: Tensor) -> Tensor:
        """Stochastic depth: a row's whole branch goes with probability `drop_path`; closing its gate does that."""
        if not self.training or self.drop_path == 0:
            return gamma
        kept = torch.rand(len(gamma), 1, 1, device=gamma.device) >= self.drop_path
        return gamma * kept / (1 - self.drop_path)
