"""Decoding a latent tile by tile, so that a large picture does not need all its activations at once.

The decoder sees far: group norm takes mean and variance of a whole picture, so tiles that are decoded apart differ from
the whole everywhere and not at their borders alone. Two ways:

exact    every layer goes over the picture in tiles that read one position beyond their border, which is all that a 3x3
         convolution reads, and every norm has the mean and variance of the whole picture, gathered tile by tile before
         it is applied. The result is that of the whole up to rounding, at its cost. Two or three activations of full
         size are alive at once, where the whole has five or more, and all else is as large as a tile.
blended  each tile runs through the whole decoder with the statistics of its own, and neighbours fade into each other
         where they overlap. Nothing of full size is alive but the picture, and colours drift from tile to tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaleweaver.tokenizers.autoencoder import Decoder, Level, ResidualBlock, Upsample

Box = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Tiles:
    """Tiles of `size` x `size` pixels. If not `exact`, neighbours fade into each other over `overlap` pixels, by
    default an eighth of their size.
    """

    size: int = 512
    overlap: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= (self.overlap or 0) <= self.size // 2:
            raise ValueError(
                f"tiles of {self.size} pixels with an overlap of {self.overlap}: expected a size from 1 on and an "
                "overlap of at most half of it"
            )

    def decode(self, vae: Any, latent: Tensor) -> Tensor:
        """Latents (B, d, Hl, Wl) -> pictures (B, 3, H, W) clamped to [-1, 1], float32, as `vae.decode` gives them."""
        latent, stride = latent.to(vae.dtype, memory_format=torch.channels_last), vae.config["stride"]
        if max(latent.shape[2:]) * stride <= self.size:
            picture: Tensor = vae.decode(latent)
            return picture
        if self.exact:
            return _exact(vae.decoder, latent, self.size).clamp_(-1, 1)
        size = max(1, self.size // stride)
        overlap = size // 8 if self.overlap is None else self.overlap // stride
        return _blended(vae.decoder, latent, stride, size, overlap).clamp_(-1, 1)


def _blended(decoder: Decoder, latent: Tensor, stride: int, size: int, overlap: int) -> Tensor:
    """Tiles of `size` latent positions, each decoded on its own and weighted by a ramp over `overlap` of them."""
    rows, height, width = len(latent), *latent.shape[2:]
    picture = torch.zeros(rows, 3, height * stride, width * stride, device=latent.device)
    total = torch.zeros(1, 1, height * stride, width * stride, device=latent.device)
    for top, bottom in _spans(height, size, overlap):
        for left, right in _spans(width, size, overlap):
            tile = decoder(latent[:, :, top:bottom, left:right]).float()  # (B, 3, h, w)
            weight = _ramp(bottom - top, overlap, stride, latent.device)[:, None] * _ramp(
                right - left, overlap, stride, latent.device
            )  # (h, w)
            place = (..., slice(top * stride, bottom * stride), slice(left * stride, right * stride))
            picture[place] += tile * weight
            total[place] += weight
    return picture.div_(total)


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Equal spans that cover `length`, neighbours sharing at least `overlap`; the last ends where the picture does."""
    if length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    return [(start, start + size) for start in starts]


def _ramp(length: int, overlap: int, stride: int, device: torch.device) -> Tensor:
    """Weights of a tile's pixels along one axis: 1 inside, falling linearly to its ends, never 0."""
    at = torch.arange(length * stride, device=device) + 0.5
    return (torch.minimum(at, length * stride - at) / max(overlap * stride, 1)).clamp(max=1)


def _exact(decoder: Decoder, latent: Tensor, size: int) -> Tensor:
    """The decoder layer by layer; layers whose picture fits into a tile run as they are."""
    x: Tensor = decoder.mid(decoder.conv_in(latent))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResidualBlock)
            x = _residual(block, x, size) if _is_large(x, size) else block(x)
        if level.upsample is not None:
            x = _upsample(level.upsample, x, size // 2) if _is_large(x, size // 2) else level.upsample(x)
    norm = _norm(decoder.norm_out, x, size)
    fold = decoder.fold
    height, width = x.shape[2] * fold, x.shape[3] * fold
    picture = torch.empty(len(x), 3, height, width, device=x.device)
    for top, bottom, left, right in _boxes(x, size):
        tile = _convolve(decoder.conv_out, x, (top, bottom, left, right), norm)
        picture[:, :, top * fold : bottom * fold, left * fold : right * fold] = F.pixel_shuffle(tile, fold)
    if decoder.shortcut is not None:
        picture += decoder.shortcut(latent)
    return picture


def _is_large(x: Tensor, size: int) -> bool:
    return max(x.shape[2:]) > size


def _residual(block: ResidualBlock, x: Tensor, size: int) -> Tensor:
    """A residual block; its result takes the place of its input where widths allow it."""
    norm = _norm(block.norm1, x, size)
    inner = _place(x, block.conv1.out_channels)
    for box in _boxes(x, size):
        _cut(inner, box).copy_(_convolve(block.conv1, x, box, norm))
    norm = _norm(block.norm2, inner, size)
    same = isinstance(block.nin_shortcut, nn.Identity)
    out = x if same else _place(x, block.conv2.out_channels)
    for box in _boxes(x, size):
        # a tile of x is read once more, here, and by no other tile
        _cut(out, box).copy_(block.nin_shortcut(_cut(x, box)) + _convolve(block.conv2, inner, box, norm))
    return out


def _upsample(layer: Upsample, x: Tensor, size: int) -> Tensor:
    out = _place(x, layer.conv.out_channels, scale=2)

    def twice(tile: Tensor) -> Tensor:
        return F.interpolate(tile, scale_factor=2.0, mode="nearest")

    for top, bottom, left, right in _boxes(x, size):
        tile = _convolve(layer.conv, x, (top, bottom, left, right), twice, scale=2)
        _cut(out, (2 * top, 2 * bottom, 2 * left, 2 * right)).copy_(tile)
    return out


def _boxes(x: Tensor, size: int) -> Iterator[Box]:
    height, width = x.shape[2:]
    for top in range(0, height, size):
        for left in range(0, width, size):
            yield top, min(top + size, height), left, min(left + size, width)


def _cut(x: Tensor, box: Box) -> Tensor:
    top, bottom, left, right = box
    return x[:, :, top:bottom, left:right]


def _place(x: Tensor, channels: int, scale: int = 1) -> Tensor:
    """Memory for an activation beside x, laid out like it."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(x), channels, scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _convolve(conv: nn.Conv2d, x: Tensor, box: Box, before: Callable[[Tensor], Tensor], scale: int = 1) -> Tensor:
    """A 3x3 convolution of `before(x)` at the positions of a box of x; `before` may enlarge by `scale`.

    Zeros lie around the picture, and around a tile what the picture has there.
    """
    height, width = x.shape[2:]
    top, bottom, left, right = box
    around = (max(top - 1, 0), min(bottom + 1, height), max(left - 1, 0), min(right + 1, width))
    tile = before(_cut(x, around))
    # what the enlarged border has too much, or less where the picture ends
    above, below, left, right = (scale * abs(a - b) for a, b in zip(around, box, strict=True))
    tile = F.pad(tile, [1 - margin for margin in (left, right, above, below)])  # a negative number cuts off
    return F.conv2d(tile, conv.weight, conv.bias)


def _norm(norm: nn.GroupNorm, x: Tensor, size: int) -> Callable[[Tensor], Tensor]:
    """Group norm with the mean and variance of all of x, then x sigmoid(x), for tiles of it."""
    groups, rows = norm.num_groups, len(x)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    count, mean, spread = 0, torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for box in _boxes(x, size):
        tile = _cut(x, box).unflatten(1, (groups, -1)).float()  # (B, G, C / G, h, w)
        number = tile[0, 0].numel()
        var, own = torch.var_mean(tile, dim=(2, 3, 4), correction=0)  # (B, G)
        # Chan, Golub and LeVeque: the moments of two samples together
        apart, both = own.to(wide) - mean, count + number
        spread = spread + var.to(wide) * number + apart.square() * (count * number / both)
        mean = mean + apart * (number / both)
        count = both
    scale = (spread / count + norm.eps).rsqrt()  # (B, G)
    weight = norm.weight.to(wide).view(groups, -1) * scale[:, :, None]  # (B, G, C / G)
    bias = norm.bias.to(wide).view(groups, -1) - mean[:, :, None] * weight
    weight, bias = (t.reshape(rows, -1, 1, 1).float() for t in (weight, bias))  # (B, C, 1, 1)
    return lambda tile: F.silu(torch.addcmul(bias, tile.float(), weight).to(tile.dtype))
