"""The Infinity transformer: all bits of a scale from all coarser scales and a prompt.

Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis (arXiv 2412.04431).
Differs from the original: text keys and values are computed once per prompt, not once per scale; blocks are one list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from scaleweaver.backbones.layers import Block, Padding, TextPool
from scaleweaver.backbones.rope import rope_table
from scaleweaver.cache import KVCache
from scaleweaver.contracts import Injector, Steps, TextContext, TextFeatures
from scaleweaver.kernels.attention import outside_autocast
from scaleweaver.kernels.gate_norm import modulate
from scaleweaver.kernels.qkv_rope import Rope
from scaleweaver.schedule import ScaleStep

_T5_XL = 2048  # width of flan-t5-xl, the text encoder of all published models

# the released models, then the scaling study of the paper
PRESETS: dict[str, dict[str, Any]] = {
    "125M": {"depth": 12, "width": 768, "heads": 8, "bits": 16},
    "2B": {"depth": 32, "width": 2048, "heads": 16, "bits": 32},
    "8B": {"depth": 40, "width": 3584, "heads": 28, "bits": 56},
    "layer12": {"depth": 12, "width": 768, "heads": 8, "bits": 32},
    "layer16": {"depth": 16, "width": 1152, "heads": 12, "bits": 32},
    "layer24": {"depth": 24, "width": 1536, "heads": 16, "bits": 32},
    "layer32": {"depth": 32, "width": 2080, "heads": 20, "bits": 32},
    "layer40": {"depth": 40, "width": 2688, "heads": 24, "bits": 32},
    "layer48": {"depth": 48, "width": 3360, "heads": 28, "bits": 32},
}


class InfinityTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """One logit per bit, for the tokens of one scale or of several at once.

    `bits` is the number of bits per transformer token. `ffn_hidden` defaults to four times the width, rounded to 256;
    `pool_heads` to one head per 128 of the text encoder's channels. `drop_path` is the stochastic depth of the last
    block, the first has none.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]  # type: ignore[misc,assignment]
    # small, and every bit depends on them; loading with a dtype leaves them alone
    _keep_in_fp32_modules: ClassVar[list[str]] = [  # type: ignore[misc,assignment]
        "head", "head_modulation", "shared_modulation", "log_scale",
    ]  # fmt: skip
    blocks: Sequence[Block]

    @register_to_config
    def __init__(
        self,
        depth: int = 12,
        width: int = 768,
        heads: int = 8,
        bits: int = 16,
        text_width: int = _T5_XL,
        text_length: int = 512,
        ffn_hidden: int | None = None,
        pool_heads: int | None = None,
        max_scales: int = 15,
        rope_mode: int = 2,
        rope_theta: float = 10000.0,
        rope_grid: int = 128,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        pool_heads = pool_heads or max(1, text_width // (64 if width > 4096 else 128))
        if width % (4 * heads) or width % pool_heads:
            raise ValueError(
                f"width {width} with {heads} heads and {pool_heads} pooling heads: the width must be a multiple of the "
                "pooling heads and of four times the heads (rows and columns each turn pairs); change one of them"
            )
        if rope_mode not in (0, 1, 2):
            raise ValueError(f"rope_mode {rope_mode} is unknown; pass 0, 1 or 2 (published models)")
        hidden = ffn_hidden or 256 * round(4 * width / 256) or 4 * width
        self.text_norm = nn.RMSNorm(text_width, eps=norm_eps)
        self.text_pool = TextPool(text_width, width, pool_heads)
        self.text_proj = nn.Sequential(
            nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.null_text = nn.Parameter(torch.zeros(text_length, text_width))
        self.first_position = nn.Parameter(torch.zeros(1, 1, width))
        self.level_embed = nn.Embedding(max_scales, width)
        self.code_embed = nn.Linear(bits, width)
        self.shared_modulation = nn.Linear(width, 6 * width)
        drops = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, hidden, norm_eps, drop) for drop in drops)  # type: ignore[assignment]
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * bits)
        self.gradient_checkpointing = False
        self.init_weights()

    @classmethod
    def preset(cls, name: str) -> InfinityTransformer:
        """A published architecture with fresh weights: 125M, 2B, 8B, or layer12 to layer48 of the scaling study."""
        if name not in PRESETS:
            raise ValueError(f"backbone preset {name!r} is unknown; pass one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @torch.no_grad()
    def init_weights(
        self,
        *,
        gate: float = 5e-6,
        modulation: float = 1e-3,
        head: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fresh weights as the published training script draws them.

        `gate` and `modulation` scale each block's own AdaLN rows, `head` the output layer.
        """
        width, depth = self.config["width"], self.config["depth"]

        def normal(tensor: Tensor) -> None:
            std = math.sqrt(1 / (3 * width))
            nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std, generator=generator)

        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                normal(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        normal(self.first_position)
        normal(self.text_pool.query)
        self.null_text.normal_(generator=generator).div_(math.sqrt(self.config["text_width"]))
        self.head.weight.mul_(head)
        self.head_modulation.weight.mul_(1e-3)
        for block in self.blocks:
            block.modulation.normal_(generator=generator).div_(math.sqrt(width))
            block.modulation[:, :, :2].mul_(gate)
            block.modulation[:, :, 2:].mul_(modulation)
            block.attn.log_scale.fill_(math.log(4))
            for layer in (block.attn.proj, block.cross.proj, block.ffn.fc2):
                layer.weight.div_(math.sqrt(2 * depth))

    def null_features(self, lengths: Sequence[int]) -> TextFeatures:
        """What stands for "no prompt" beside prompts of these lengths: the first rows of a learned table."""
        if max(lengths) > len(self.null_text):
            raise ValueError(
                f"a prompt has {max(lengths)} tokens, the unconditional table {len(self.null_text)}; shorten the prompt"
            )
        return TextFeatures(torch.cat([self.null_text[:n] for n in lengths]), tuple(lengths))

    def encode_text(self, text: TextFeatures) -> TextContext:
        """All that blocks need from R = len(text) prompts."""
        expected = (sum(text.lengths), self.config["text_width"])
        if tuple(text.features.shape) != expected or min(text.lengths, default=0) < 1:
            raise ValueError(
                f"text features {tuple(text.features.shape)} for lengths {text.lengths}: expected {expected} and at "
                "least one token a prompt; an empty prompt still has its end token"
            )
        padding = Padding(text.lengths, self.null_text.device)
        dtype = self.text_pool.kv.weight.dtype
        normed = self._normed_text(text.features).to(dtype)  # (sum, T)
        pooled = self.text_pool(normed, padding).float()  # (R, C)
        sequence = self.text_proj(normed)  # (sum, C)
        keys, values = [], []
        for block in self.blocks:
            k, v = block.cross.keys_values(sequence)  # (sum, C)
            keys.append(padding.heads(k, self.config["heads"]))  # (R, H, P, D)
            values.append(padding.heads(v, self.config["heads"]))  # (R, H, P, D)
        modulation = _linear_fp32(self.shared_modulation, F.silu(pooled))[:, None].unflatten(2, (6, -1))  # (R, 1, 6, C)
        return TextContext(pooled, modulation, keys, values, padding.mask)

    def _normed_text(self, features: Tensor) -> Tensor:
        weight = self.text_norm.weight.float()
        return F.rms_norm(features.to(weight.device).float(), weight.shape, weight, self.config["norm_eps"])

    def embed(self, inputs: Tensor | None, steps: Steps, text: TextContext) -> Tensor:
        """Input codes (R, T', N) of all scales but the schedule's first -> hidden states (R, T, C) float32."""
        rows, first = len(text.pooled), steps[0]
        expected = sum(step.n for step in steps if step.index > 0)
        bits, most = self.config["bits"], self.config["max_scales"]
        given = (rows, 0, bits) if inputs is None else tuple(inputs.shape)
        if given != (rows, expected, bits) or steps[-1].index >= most:
            raise ValueError(
                f"inputs of shape {given} for scales {first.index} to {steps[-1].index}: expected "
                f"{(rows, expected, bits)} (rows of the text, tokens without scale 0, bits) and at most {most} scales"
            )
        parts = []
        if first.index == 0:
            parts.append((text.pooled[:, None] + self.first_position).expand(-1, first.n, -1))  # (R, n_0, C)
        if inputs is not None and expected:
            parts.append(self.code_embed(inputs.to(self.code_embed.weight.dtype)).float())  # (R, T', C)
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (R, T, C)
        return x + self.level_embedding(steps)

    def level_embedding(self, steps: Steps) -> Tensor:
        """The embedding of its scale for every token, (T, C)."""
        embedding: Tensor = self.level_embed(_levels(tuple(steps), self.null_text.device))
        return embedding

    def rope(self, steps: Steps) -> Rope:
        """(cos, sin), each (T, D/2) float32, remembered per scales and device."""
        return rope_table(
            steps,
            head_width=self.config["width"] // self.config["heads"],
            theta=self.config["rope_theta"],
            mode=self.config["rope_mode"],
            grid=self.config["rope_grid"],
            device=self.null_text.device,
        )

    def forward(
        self,
        inputs: Tensor | None,
        steps: Steps,
        text: TextContext,
        cache: KVCache,
        *,
        injectors: Sequence[Injector] = (),
        layers: Sequence[int] | None = None,
        mix: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (R, T, N) float32: the log-odds of bit j being 1, log p(1) - log p(0).

        inputs as in `embed`; `layers` runs only these blocks; `mix(layer, x)` may change the state after a block.
        """
        x = self.embed(inputs, steps, text)  # (R, T, C)
        rope = self.rope(steps)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        if checkpointing and not steps[-1].is_last:
            raise ValueError(
                "gradient checkpointing runs blocks twice, which a cache that keeps these scales would see; pass all "
                "scales of the schedule or call disable_gradient_checkpointing()"
            )
        for layer in range(len(self.blocks)) if layers is None else layers:
            block, arguments = self.blocks[layer], (x, layer, steps, rope, text, cache, injectors)
            x = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)  # type: ignore[misc]
            if mix is not None:
                x = mix(layer, x)  # (R, T, C)
        return self.head_logits(x, text)

    def head_logits(self, x: Tensor, text: TextContext) -> Tensor:
        """Hidden states (R, T, C) -> logits (R, T, N) float32."""
        scale, shift = _linear_fp32(self.head_modulation, F.silu(text.pooled))[:, None].chunk(2, dim=-1)  # (R, 1, C)
        return _log_odds(self.head, modulate(x, scale, shift, self.config["norm_eps"]))  # (R, T, N)


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer at its weights' precision, outside autocast, with a float32 result."""
    with outside_autocast(x):
        return layer(x.to(layer.weight.dtype)).float()


def _log_odds(head: nn.Linear, x: Tensor) -> Tensor:
    """Output 2j + 1 of the head minus output 2j: published heads have a class each for bit j being 0 and 1, of which
    only the difference matters. That of the weights takes half the products.
    """
    if type(head) is not nn.Linear:  # a LoRA sits in it
        classes = _linear_fp32(head, x)  # (R, T, 2N)
        return classes[..., 1::2] - classes[..., ::2]  # (R, T, N)
    with outside_autocast(x):
        weight, bias = head.weight[1::2] - head.weight[::2], head.bias[1::2] - head.bias[::2]  # (N, C), (N,)
        return F.linear(x.to(weight.dtype), weight, bias).float()  # (R, T, N)


@lru_cache(maxsize=64)
def _levels(steps: tuple[ScaleStep, ...], device: torch.device) -> Tensor:
    # a tensor made under inference_mode could not be used for training later
    with torch.inference_mode(False):
        return torch.tensor([step.index for step in steps for _ in range(step.n)], device=device)  # (T,)
