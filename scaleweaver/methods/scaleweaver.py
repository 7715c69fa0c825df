"""Control by reference attention, a reimplementation of the mechanism of ScaleWeaver.

ScaleWeaver: Weaving Efficient Controllable T2I Generation with Multi-Scale Reference Attention (arXiv 2510.14882).

A control image runs once through the frozen backbone's own blocks, with LoRA on, as a second stream of tokens; the
image's queries read its keys and values, and a zero-initialised linear layer Z adds the result. The condition stream
never reads the image, so it does not change while the image is drawn. In block b, at scale k:

    x = LN(X) (1 + scale1) + shift1                    c = LN(C) (1 + scale1) + shift1
    O_self = Attn(Wq x, [cache, Wk x], [cache, Wv x])
    O_ref  = Attn(Wq x, (Wk + dWk) c, (Wv + dWv) c)
    X <- X + gamma1 (Wo O_self + s_k Z O_ref)
    C <- C + gamma1 (Wo + dWo) Attn(Qc, Kc, Vc);   C <- C + FFN(C)

Known from the paper's abstract and from public reviews: the frozen backbone with LoRA on condition tokens, the
direction of attention (image reads condition only), the zero-initialised linear projection, injection into the first
half of the blocks. Inferred: everything else. A softmax of its own for the reference, because a joint one would
change the fresh model; Z as a full C x C layer on the attention result, inside the AdaLN gate; same-scale scope;
tokens from the continuous latent; positions and level embedding of the image tokens; modulation by the null text and
no text cross-attention, so that one condition pass serves all prompts and guidance branches; a type embedding and an
affine on the inputs; the penalty of distance; rank and targets of the LoRA. Each is a field of `ScaleWeaverConfig`,
saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaleweaver.contracts import TextContext
from scaleweaver.kernels.gate_norm import gate_norm, modulate
from scaleweaver.kernels.interval_attention import attend_ranges
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.lora import lora_enabled, require_lora
from scaleweaver.reference import Fusion, Position, ReferenceBank, Scope, reference_ranges
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.target import ResidualTarget

Modulation = Literal["null", "text"]
Tokens = Literal["continuous", "quantised"]
Start = Literal["zero", "normal"]
Placement = Literal["first_half", "last_half", "every_other", "all"]


@dataclass(frozen=True)
class ScaleWeaverConfig:
    """All choices of one control; saved beside its weights.

    inject_blocks: blocks whose image queries read the condition, by number or by placement, None for the first half.
    z_init: "normal" starts Z at random (standard deviation 0.02), an ablation. lora_alpha: None for the rank.
    null_tokens: length of the null text whose pool modulates the condition stream. locality: what a score
    loses per squared grid cell between image token and condition token at the start of training, one learned number
    a block; None for attention by content alone. detector, thresholds and resolution record how the training maps
    were made, so that a user's map can be made alike.
    """

    kind: str
    fusion: Fusion = "separate"
    scope: Scope = "same"
    inject_blocks: tuple[int, ...] | Placement | None = None
    condition_modulation: Modulation = "null"
    condition_tokens: Tokens = "continuous"
    z_position: Position = "before_gate"
    z_init: Start = "zero"
    locality: float | None = None
    lora_rank: int = 16
    lora_alpha: int | None = None
    lora_targets: tuple[str, ...] = ("attn.qkv", "attn.proj")
    null_tokens: int = 16
    detector: str = ""
    thresholds: tuple[float, ...] = ()
    resolution: int | None = None

    def __post_init__(self) -> None:
        # JSON knows lists only
        for name in ("inject_blocks", "lora_targets", "thresholds"):
            value = getattr(self, name)
            placed = name == "inject_blocks" and isinstance(value, str)
            object.__setattr__(self, name, value if value is None or placed else tuple(value))
        for name, hint in get_type_hints(type(self)).items():
            if getattr(hint, "__origin__", None) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {choices}")
        if isinstance(self.inject_blocks, str) and self.inject_blocks not in get_args(Placement):
            choices = ", ".join(map(repr, get_args(Placement)))
            raise ValueError(f"inject_blocks={self.inject_blocks!r}: expected block numbers, None or one of {choices}")
        if not self.kind:
            raise ValueError("kind is empty; pass the kind of control, for example 'canny'")
        if self.locality is not None and not 0 < self.locality < math.inf:
            raise ValueError(f"locality={self.locality}: expected a positive number, or None for no penalty")
        if self.lora_rank < 1 or self.null_tokens < 1 or not self.lora_targets:
            raise ValueError(
                f"lora_rank={self.lora_rank}, null_tokens={self.null_tokens}, lora_targets={self.lora_targets}: "
                "expected 1 or more, 1 or more and at least one target"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        """The numbers in inject_blocks, which a config that was not resolved may lack."""
        return self.inject_blocks if isinstance(self.inject_blocks, tuple) else ()

    @property
    def alpha(self) -> int:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def resolve(self, depth: int) -> ScaleWeaverConfig:
        """The same config with the blocks written out for a backbone of this depth."""
        placed = {
            "first_half": range(max(1, depth // 2)),
            "last_half": range(depth // 2, depth),
            "every_other": range(0, depth, 2),
            "all": range(depth),
        }
        given = "first_half" if self.inject_blocks is None else self.inject_blocks
        blocks = tuple(placed[given] if isinstance(given, str) else sorted(given))
        if not blocks or len(set(blocks)) != len(blocks) or blocks[0] < 0 or blocks[-1] >= depth:
            raise ValueError(f"inject_blocks {blocks}: expected different block numbers from 0 to {depth - 1}")
        return replace(self, inject_blocks=blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScaleWeaverConfig:
        """Inverse of `to_dict`; an unknown field is an error, because it would silently change the method."""
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown control settings {unknown}; the file may need a newer scaleweaver")
        return cls(**data)


class ControlAdapter(nn.Module):
    """The weights of one control beside its LoRA: Z per injected block, type embedding, affine on the inputs.

    Fresh weights change nothing: Z, the type embedding and the shift are zero, the scale is one. With fusion="joint"
    there is no Z and even fresh weights change the image, as they do with z_init="normal"; both are ablations.
    `edition` names the weights, which a control that is replaced changes: what was encoded before is then of no use.
    """

    def __init__(self, config: ScaleWeaverConfig, *, depth: int, width: int, bits: int) -> None:
        super().__init__()
        self.config = config.resolve(depth)
        self.depth, self.width, self.bits = depth, width, bits
        self.edition = uuid4().hex
        self.input_scale = nn.Parameter(torch.ones(bits))
        self.input_shift = nn.Parameter(torch.zeros(bits))
        self.type_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.log_locality: nn.Parameter | None = None
        if config.locality is not None:
            self.log_locality = nn.Parameter(torch.full((len(self.blocks),), math.log(config.locality)))
        self.z = nn.ModuleDict()
        if config.fusion == "separate":
            for block in self.blocks:
                self.z[str(block)] = layer = nn.Linear(width, width)
                if config.z_init == "normal":
                    nn.init.normal_(layer.weight, std=0.02)
                else:
                    nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The injected blocks; the condition stream runs up to the last of them."""
        return self.config.blocks

    @property
    def fusion(self) -> Fusion:
        return self.config.fusion

    @property
    def scope(self) -> Scope:
        return self.config.scope

    @property
    def z_position(self) -> Position:
        return self.config.z_position

    def project(self, layer: int, attended: Tensor) -> Tensor:
        """Z of this block on the attention result (R, H, L, D) -> (R, L, C)."""
        z = self.z[str(layer)]
        flat = attended.transpose(1, 2).flatten(2)  # (R, L, C)
        return z(flat.to(z.weight.dtype)).to(flat.dtype)  # type: ignore[arg-type]

    def penalty(self, layer: int) -> Tensor | None:
        """Score lost per squared cell of distance between a token and a condition token, a positive scalar."""
        return None if self.log_locality is None else self.log_locality[self.blocks.index(layer)].float().exp()


def condition_inputs(
    latent: Tensor, schedule: ScaleSchedule, target: ResidualTarget, kind: Tokens = "continuous"
) -> Tensor:
    """Tokens of the control image at every scale: latent (B, d, Hl, Wl) -> (B, T, N).

    Scale k of "continuous" is the latent itself, area-resized; of "quantised" it is the sum of the codes of scales
    0..k: up to k where the image's own inputs stop at k - 1, because a condition need not be predicted and scale 0
    would get nothing.
    """
    target.check_latent(latent, schedule)
    if kind == "quantised":
        scales = zip(schedule.steps, target.quantize(latent, schedule), strict=True)
        return torch.cat([target.next_input(code.latent, step) for step, code in scales], dim=1)  # (B, T, N)
    maps = [F.interpolate(latent, size=target.grid(step), mode="area") for step in schedule.steps]
    return torch.cat([F.pixel_unshuffle(x, target.patch).flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, T, N)


def encode(
    backbone: Any,
    adapter: ControlAdapter,
    name: str,
    latent: Tensor,
    schedule: ScaleSchedule,
    target: ResidualTarget,
    text: TextContext | None = None,
) -> ReferenceBank:
    """The condition stream of all scales in one pass, LoRA `name` on: latent (Bc, d, Hl, Wl) -> keys and values.

    With condition_modulation="null" the bank has the latent's rows and serves every prompt; with "text" it has one
    row per row of `text`, whose number must be a multiple of the latent's. Differentiable in all weights of the
    control.
    """
    inputs = condition_inputs(latent, schedule, target, adapter.config.condition_tokens)  # (Bc, T, N)
    return prefill(backbone, adapter, name, inputs, schedule, text)


def prefill(
    backbone: Any,
    adapter: ControlAdapter,
    name: str,
    inputs: Tensor,
    schedule: ScaleSchedule,
    text: TextContext | None = None,
) -> ReferenceBank:
    """`encode` from the condition's tokens (Bc, T, N) on."""
    require_lora(backbone, name)
    steps = schedule.steps
    with lora_enabled(backbone, name):  # a style LoRA may sit in any layer
        modulation, repeats = _modulation(backbone, adapter.config, text, len(inputs))  # (1 | R, 1, 6, C)
        inputs = inputs.repeat(repeats, 1, 1)  # (Bc | R, T, N)
        inputs = inputs.to(adapter.input_scale) * adapter.input_scale + adapter.input_shift
        c = backbone.code_embed(inputs.to(backbone.code_embed.weight.dtype)).float()  # (Bc | R, T, C)
        c = c + backbone.level_embedding(steps) + adapter.type_embed
    rope = backbone.rope(steps)
    ranges = reference_ranges(steps, adapter.scope)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for layer in range(adapter.blocks[-1] + 1):
        arguments = (backbone.blocks[layer], name, c, modulation, rope, ranges, layer == adapter.blocks[-1])
        if getattr(backbone, "gradient_checkpointing", False) and torch.is_grad_enabled():
            c, k, v = checkpoint(condition_block, *arguments, use_reentrant=False)
        else:
            c, k, v = condition_block(*arguments)
        if layer in adapter.blocks:
            # in memory of its own: a view would keep the queries beside it alive
            keys[layer], values[layer] = k.to(v.dtype).contiguous(), v  # (Bc, H, T, D)
    return ReferenceBank(keys, values, schedule)


def condition_block(
    block: Any, name: str, c: Tensor, modulation: Tensor, rope: Any, ranges: KeyRanges | None, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One backbone block on condition tokens (Bc, T, C), without text: the tokens and their keys and values.

    The LoRA switch lies in here, not around the loop, because checkpointing runs this again during the backward pass.
    """
    with lora_enabled(block, name):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = block.gates(modulation)
        y = modulate(c, scale1, shift1, block.eps, dtype=block.attn.q_bias.dtype)  # (Bc, T, C)
        q, k, v = block.attn.project(y, rope)  # (Bc, H, T, D)
        if last:  # nobody reads these tokens any further
            return c, k, v
        out, _ = attend_ranges(q.to(v.dtype), k.to(v.dtype), v, ranges)  # (Bc, H, T, D)
        dtype = block.ffn.fc1.bias.dtype
        c, y = gate_norm(c, block.attn.output(out), gamma1, scale2, shift2, eps=block.eps, dtype=dtype)
        return torch.addcmul(c, gamma2, block.ffn(y)), k, v


def _modulation(backbone: Any, config: ScaleWeaverConfig, text: TextContext | None, rows: int) -> tuple[Tensor, int]:
    """Shared AdaLN vectors of the condition stream and how often the condition rows repeat to meet them."""
    if config.condition_modulation == "null":
        with torch.no_grad():
            null = backbone.null_features((min(config.null_tokens, backbone.config.text_length),))
            return backbone.encode_text(null).modulation, 1
    if text is None:
        raise ValueError('condition_modulation="text" needs the prompt: pass text=, one row per image row')
    wanted = text.modulation.shape[0]
    if wanted % rows:
        raise ValueError(f"{rows} control images for {wanted} rows of text; pass one control, or one per image")
    return text.modulation, wanted // rows
