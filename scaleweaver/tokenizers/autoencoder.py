"""Convolutional encoder and decoder of the bitwise image tokenizer (Infinity, arXiv 2412.04431).

Group norm, x * sigmoid(x) and 3x3 convolutions, no attention. One width per level; all levels but the deepest halve the
picture. Module names are the published ones without the inner `.conv` / `.norm`.
Differs from the paper: `fold` moves f x f pixels into channels first, so that a small model may skip the finest levels
(their cost, not their weight, rules on a CPU); 1 is the published network. The stride is fold * 2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MANY_PIXELS = 1024  # from where on it pays to prepare weights for `_smooth_repeated`


def group_norm(width: int, groups: int = 32) -> nn.GroupNorm:
    """Group norm with `groups` groups, else 24, else the largest number below that divides the width."""
    count = next(g for g in (groups, 24, *range(groups, 0, -1)) if g <= groups and width % g == 0)
    return nn.GroupNorm(count, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip; (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, width_in: int, width_out: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out, groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(_normed_silu(self.norm1, x))
        y = self.conv2(_normed_silu(self.norm2, y))
        return self.nin_shortcut(x) + y if torch.is_grad_enabled() else y.add_(self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width; the zero border is on the right and bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, h/2, w/2)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then smooths.

    Drawing on a CPU, large pictures are smoothed without being doubled first: the same up to rounding, in less time.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.as_on(x.device.type, x)

    def as_on(self, device: str, x: Tensor) -> Tensor:
        """The route that is taken on a device of this type."""
        many = x.shape[2] * x.shape[3] >= _MANY_PIXELS
        if many and device == "cpu" and not torch.is_grad_enabled():
            return _smooth_repeated(x, self.conv)  # (B, C, 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2h, 2w)


class Level(nn.Module):
    """Residual blocks of one resolution, and the resampling that leads to the next one."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width_in if i == 0 else width, width, groups) for i in range(blocks))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the deepest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> latents (B, channels, H / stride, W / stride); `stem` is the first convolution's width.

    With `fold` f the first convolution reads f x f pixels as channels, which saves the costly full-resolution level.
    With `shortcut` a linear map of each stride x stride patch is added, which the convolutions then only correct.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        stem: int | None = None,
        blocks: int = 2,
        groups: int = 32,
        fold: int = 1,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        stem = stem or widths[0]
        self.fold = fold
        stride = fold * 2 ** (len(widths) - 1)
        self.shortcut = nn.Conv2d(3, channels, stride, stride) if shortcut else None
        self.conv_in = nn.Conv2d(3 * fold**2, stem, 3, padding=1)
        self.down = nn.ModuleList()
        for before, width in zip([stem, *widths[:-1]], widths, strict=True):
            level = Level(before, width, blocks, groups)
            if len(self.down) < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, self.fold))  # (B, C, H / fold, W / fold)
        for level in self.down:
            x = level(x)
        latent = self.conv_out(_normed_silu(self.norm_out, self.mid(x)))  # (B, channels, Hl, Wl)
        return latent if self.shortcut is None else latent + self.shortcut(images)


class Decoder(nn.Module):
    """Latents (B, channels, Hl, Wl) -> pictures (B, 3, H, W), not clamped.

    The layout in memory is that of the latents, and channels-last is the fast one.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        *,
        blocks: int = 3,
        groups: int = 32,
        fold: int = 1,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.fold = fold
        stride = fold * 2 ** (len(widths) - 1)
        self.shortcut = nn.ConvTranspose2d(channels, 3, stride, stride) if shortcut else None
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()  # index 0 is the finest level, as in the encoder
        for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(before, width, blocks, groups)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3 * fold**2, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        images = F.pixel_shuffle(self.conv_out(_normed_silu(self.norm_out, x)), self.fold)  # (B, 3, H, W)
        return images if self.shortcut is None else images + self.shortcut(latent)


def _normed_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _smooth_repeated(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of x (B, C, h, w) with every pixel repeated 2x2 -> (B, O, 2h, 2w), with 4 of 9 products.

    A 3x3 window on repeated pixels covers 2x2 different ones. Which of its weights meet the same pixel depends on
    whether row and column of the result are even or odd: four small convolutions, whose results are interleaved.
    """
    weight = conv.weight.permute(2, 3, 0, 1).float()  # (3, 3, O, C)
    merged = [both for rows in _meeting(weight) for both in _meeting(rows.transpose(0, 1))]  # columns before rows
    kernels = torch.stack(merged).permute(0, 3, 4, 2, 1).flatten(0, 1)  # (4 O, C, 2, 2)
    kernels = kernels.to(x.dtype, memory_format=torch.channels_last)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    parts = F.conv2d(x, kernels, bias, padding=1).permute(0, 2, 3, 1)  # (B, h + 1, w + 1, 4 O)
    parts = parts.unflatten(3, (2, 2, -1))  # (B, h + 1, w + 1, 2, 2, O)
    batch, _, h, w = x.shape
    out = x.new_empty(batch, h, 2, w, 2, parts.shape[-1])
    for row, column in product((0, 1), repeat=2):
        out[:, :, row, :, column] = parts[:, row : row + h, column : column + w, row, column]
    return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)  # (B, O, 2h, 2w), channels-last


def _meeting(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Three taps on repeated pixels (3, ...) -> two taps (2, ...) on the pixels, for even and for odd places."""
    first, middle, last = weights
    return torch.stack((first, middle + last)), torch.stack((first + middle, last))


def check_widths(widths: Sequence[int], stride: int, fold: int = 1) -> None:
    """Every level but the deepest halves the folded picture."""
    given = fold * 2 ** max(len(widths) - 1, 0)
    if not widths or min(*widths, fold) < 1 or stride != given:
        raise ValueError(
            f"widths {tuple(widths)} with fold {fold} give a stride of {given}, not {stride}; "
            "pass log2(stride / fold) + 1 widths"
        )
