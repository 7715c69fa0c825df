"""Bitwise image tokenizer: convolutional autoencoder with multi-scale residual binary spherical quantisation.

Infinity (arXiv 2412.04431) for the residual scales; Image and Video Tokenization with Binary Spherical Quantization
(arXiv 2406.07548) for the codes and the entropy penalty.
Differs from the papers: the straight-through gradient of the running latent of a scale is that of its low-pass
projection of the encoder output, which at the last scale is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.autoencoder import Decoder, Encoder, check_widths
from scaleweaver.tokenizers.target import ResidualTarget

_STRIDE_16 = (128, 256, 512, 512, 512)
_STRIDE_8 = (128, 256, 512, 512)

# the published tokenizers: constructor arguments that differ from the defaults
PRESETS: dict[str, dict[str, Any]] = {
    "d16": {"bits": 16},
    "d24": {"bits": 24},
    "d32": {"bits": 32},
    "d64": {"bits": 64},
    "d56_f8": {"bits": 14, "stride": 8, "widths": _STRIDE_8, "patch": 2},
}


@dataclass(frozen=True)
class TrainingCode:
    """Differentiable quantisation of a batch."""

    latent: Tensor  # (B, d, Hl, Wl) final quantised latent, gradient passed straight through
    running: list[Tensor]  # S x (B, d, Hl, Wl) the same after every scale
    bits: list[Tensor]  # S x (B, ph, pw, d) uint8
    commitment: Tensor  # (S,) mean squared distance of the encoder output to the running latent of each scale
    entropy: Tensor  # (S,) mean entropy of a bit minus entropy of the batch-mean bit, nats; lower is better


class BSQTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, d, H / stride, W / stride) <-> bits per scale.

    `bits` is d; `patch` is the number of tokenizer positions per transformer token and axis (2 for the 8B model),
    so a schedule's stride is `stride * patch`. `stem_width` is the encoder's first width if it is not `widths[0]`;
    `fold` reads and writes blocks of fold x fold pixels as channels, and `shortcut` adds a linear path for each
    patch (for small models on a CPU; the published ones have neither).
    """

    @register_to_config
    def __init__(
        self,
        bits: int = 32,
        stride: int = 16,
        widths: Sequence[int] = _STRIDE_16,
        patch: int = 1,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        stem_width: int | None = None,
        norm_groups: int = 32,
        fold: int = 1,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        check_widths(widths, stride, fold)
        self.encoder = Encoder(
            bits, widths, stem=stem_width, blocks=encoder_blocks, groups=norm_groups, fold=fold, shortcut=shortcut
        )
        self.decoder = Decoder(bits, widths, blocks=decoder_blocks, groups=norm_groups, fold=fold, shortcut=shortcut)
        self.target = ResidualTarget(bits, patch)

    @classmethod
    def preset(cls, name: str) -> BSQTokenizer:
        """A published architecture with fresh weights: d16, d24, d32, d64 (stride 16) or d56_f8 (8B, stride 8)."""
        if name not in PRESETS:
            raise ValueError(f"tokenizer preset {name!r} is unknown; pass one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> continuous latents (B, d, Hl, Wl), float32."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.config["stride"] for side in images.shape[2:]):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) with H and W multiples of "
                f"{self.config['stride']}; crop or resize them first"
            )
        return self.encoder(images.to(self.dtype)).float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, d, Hl, Wl) -> pictures (B, 3, H, W) clamped to [-1, 1], float32."""
        # with channels last, convolutions need not rearrange what they read and write
        latent = latent.to(self.dtype, memory_format=torch.channels_last)
        return self.decoder(latent).float().clamp(-1, 1)

    @torch.no_grad()
    def quantize(self, latent: Tensor, schedule: ScaleSchedule) -> tuple[list[Tensor], Tensor]:
        """Bits of every scale in tokenizer layout, S x (B, ph, pw, d) uint8, and the quantised latent."""
        scales = list(self.target.quantize(latent, schedule))
        return [scale.bits for scale in scales], scales[-1].latent

    def quantize_train(
        self, latent: Tensor, schedule: ScaleSchedule, inverse_temperature: float = 10.0
    ) -> TrainingCode:
        """Quantisation with straight-through gradients and the two regularisers, one value per scale.

        The entropy uses soft bits p_j = sigmoid(2 t u_j / sqrt(d)) of the unit residual u at temperature 1/t; bits are
        independent, so both entropies are sums over bits (reported per bit).
        """
        running, bits, commitment, entropy = [], [], [], []
        for scale in self.target.quantize(latent.detach(), schedule):
            # the sum of earlier codes is a constant: only the encoder output carries a gradient
            pooled = F.interpolate(latent, size=self.target.grid(scale.step), mode="area")  # (B, d, ph, pw)
            smooth = F.interpolate(pooled, size=latent.shape[-2:], mode="bilinear")  # (B, d, Hl, Wl)
            if scale.step.is_last:
                smooth = latent
            running.append(scale.latent + (smooth - smooth.detach()))
            bits.append(scale.bits)
            commitment.append(F.mse_loss(latent, scale.latent))
            rest = scale.residual + (pooled - pooled.detach())
            entropy.append(bit_entropy(F.normalize(rest, dim=1), inverse_temperature))
        return TrainingCode(running[-1], running, bits, torch.stack(commitment), torch.stack(entropy))

    def forward(self, images: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, TrainingCode]:
        """Training pass: pictures -> reconstruction (B, 3, H, W), not clamped, and the code it was made from."""
        code = self.quantize_train(self.encode(images), schedule)
        return self.decoder(code.latent.to(self.dtype)).float(), code


def bit_entropy(unit: Tensor, inverse_temperature: float) -> Tensor:
    """E[H(p)] - H(E[p]) of the soft bits of unit vectors (B, d, h, w), averaged over bits, in nats."""
    p = torch.sigmoid(unit.float() * (2 * inverse_temperature / math.sqrt(unit.shape[1])))  # (B, d, h, w)
    return _binary_entropy(p).mean() - _binary_entropy(p.mean(dim=(0, 2, 3))).mean()


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)  # keeps the logarithms finite in float32
    return -(p * p.log() + (1 - p) * (1 - p).log())
