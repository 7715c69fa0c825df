"""Depth and key points of pictures of the built-in world, by one small network that ships with the SDK.

It was trained on renders alone and knows nothing else: for photographs take the detectors of `depth` and `pose`. What
it says is independent of the generator, which never saw the renders it learned from.
Depth is inverse and relative to the picture: 1 is the nearest point, 1/255 the farthest one, 0 the sky. There is at
most one person in a picture of that world, and joints have COCO-18 order as OpenPose has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from torch import Tensor, nn

JOINTS = 18
STRIDE = 4  # pixels per cell of the joints' heat maps
REACH = 2  # cells around the peak that say where exactly a joint is
FARTHEST = 1 / 255  # of what is not sky


class ToyboxEstimator(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A U-net with two heads: inverse depth and sky at full size, heat maps of the joints at a quarter of it.

    Pictures of other sizes are stretched to `size` and the answers back. `threshold` is the probability from which
    somebody is there.
    """

    @register_to_config
    def __init__(self, widths: Sequence[int] = (16, 40, 64, 120, 168), size: int = 128, threshold: float = 0.5) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth, last = widths  # channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size
        if size % 32:
            raise ValueError(f"size is {size}; expected a multiple of 32, which is halved five times")
        self.down = nn.ModuleList(
            [
                _block(3, half, 2),
                nn.Sequential(_block(half, quarter, 2), _block(quarter, quarter)),
                nn.Sequential(_block(quarter, eighth, 2), _block(eighth, eighth)),
                nn.Sequential(_block(eighth, sixteenth, 2), _block(sixteenth, sixteenth)),
                nn.Sequential(_block(sixteenth, last, 2), _block(last, last)),
            ]
        )
        pairs = [(last, sixteenth), (sixteenth, eighth), (eighth, quarter), (quarter, half)]
        self.up = nn.ModuleList([nn.Conv2d(coarse, fine, 1) for coarse, fine in pairs])
        self.fuse = nn.ModuleList([_block(fine, fine) for _, fine in pairs])
        self.joints = nn.Sequential(_block(quarter, quarter), nn.Conv2d(quarter, JOINTS, 1))
        self.surface = nn.Sequential(nn.Conv2d(half, 2 * 4, 3, padding=1), nn.PixelShuffle(2))  # depth, sky
        self.person = nn.Linear(2 * last, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> {"depth", "sky", "joints", "person"}.

        "depth" (B, H, W) is 1 at the nearest point and 0 at the farthest one, without meaning in the sky. "sky"
        (B, H, W), "person" (B,) and "joints" (B, 18, H/4, W/4) are logits, those of a joint over all its cells.
        """
        features = [images]
        for stage in self.down:
            features.append(stage(features[-1]))
        x = features[-1]  # (B, *, H/32, W/32)
        person = self.person(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))[:, 0]  # (B,)
        decoded = []
        for up, fuse, skip in zip(self.up, self.fuse, features[-2:0:-1], strict=True):
            x = fuse(skip + F.interpolate(up(x), scale_factor=2, mode="nearest"))
            decoded.append(x)
        depth, sky = self.surface(decoded[-1]).unbind(1)  # (B, H, W) both
        return {"depth": depth, "sky": sky, "joints": self.joints(decoded[-2]), "person": person}

    @classmethod
    def built_in(cls, device: str | torch.device = "cpu") -> ToyboxEstimator:
        """The trained network that ships with the SDK, in float32."""
        folder = str(files("scaleweaver") / "assets" / "estimator")
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ValueError(
                f"the estimator for pictures of the built-in world is not part of this installation ({folder} lacks"
                ' config.json); run "pip install --force-reinstall --no-deps ." in a complete clone'
            )
        network: Any = cls.from_pretrained(folder, torch_dtype=torch.float32)
        estimator: ToyboxEstimator = network.eval().to(device)
        return estimator

    def depth(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Inverse depth (H, W) of a picture (H, W, 3): near is 1, the sky 0."""
        depth: NDArray[np.float32] = self.depths(_one(picture))[0]
        return depth

    def keypoints(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(people, 18, 3) of a picture (H, W, 3): x, y in pixels and a confidence from 0 to 1; nobody is (0, 18, 3)."""
        return self.poses(_one(picture))[0]

    def depths(self, pictures: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """Inverse depth (B, H, W) of pictures (B, H, W, 3): near is 1, the sky 0."""
        _check(pictures)
        height, width = pictures.shape[1:3]
        found = np.zeros(pictures.shape[:3], np.float32)
        row = 0
        for out in self._answers(pictures, batch):
            for depth, sky in zip(out["depth"].numpy(), out["sky"].numpy(), strict=True):
                near = _resized(depth, width, height).clip(0, 1)
                solid = _resized(sky, width, height) < 0
                found[row] = np.where(solid, FARTHEST + (1 - FARTHEST) * near, 0)
                row += 1
        return found

    def poses(self, pictures: NDArray[np.uint8], batch: int = 32) -> list[NDArray[np.float32]]:
        """`keypoints` of pictures (B, H, W, 3), one array each."""
        _check(pictures)
        stretch = pictures.shape[2] / self.config["size"], pictures.shape[1] / self.config["size"]
        people: list[NDArray[np.float32]] = []
        for out in self._answers(pictures, batch):
            somebody = out["person"].sigmoid()  # (B,)
            points = locate_joints(out["joints"])  # (B, 18, 3)
            points[..., :2] *= torch.tensor(stretch)
            points[..., 2] *= somebody[:, None]
            for there, person in zip(somebody >= self.config["threshold"], points, strict=True):
                people.append(person[None].numpy() if there else np.zeros((0, JOINTS, 3), np.float32))
        return people

    @torch.inference_mode()
    def _answers(self, pictures: NDArray[np.uint8], batch: int) -> Iterator[dict[str, Tensor]]:
        """What `forward` says of the pictures at the network's own size, in float32 on the CPU, batch by batch."""
        size = self.config["size"]
        for start in range(0, len(pictures), batch):
            chunk = np.stack([_resized(picture, size, size) for picture in pictures[start : start + batch]])
            images = torch.from_numpy(chunk).to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
            yield {name: value.float().cpu() for name, value in self(images).items()}


def locate_joints(logits: Tensor) -> Tensor:
    """Logits (B, 18, h, w) over the cells -> (B, 18, 3): x and y in pixels, and how sure the place is.

    The place is the mean of the cells around the likeliest one; their share of the probability is the confidence.
    """
    height, width = logits.shape[2:]
    p = logits.flatten(2).softmax(dim=2).unflatten(2, (height, width))  # (B, 18, h, w)
    peak = p.flatten(2).argmax(dim=2)  # (B, 18)
    rows, columns = torch.arange(height, device=p.device), torch.arange(width, device=p.device)
    near_row = (rows - (peak // width)[..., None]).abs() <= REACH  # (B, 18, h)
    near_column = (columns - (peak % width)[..., None]).abs() <= REACH  # (B, 18, w)
    p = p * near_row[..., None] * near_column[..., None, :]
    share = p.sum((2, 3))  # (B, 18)
    x, y = (p.sum(2) * (columns + 0.5)).sum(2) / share, (p.sum(3) * (rows + 0.5)).sum(2) / share
    return torch.stack([STRIDE * x, STRIDE * y, share], dim=2)


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, out), nn.SiLU())


def _resized(picture: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """A picture or map (H, W[, 3]) at another size: averaged where it gets smaller, linear where larger."""
    if picture.shape[:2] == (height, width):
        return picture
    smaller = width * height < picture.shape[0] * picture.shape[1]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    resized: NDArray[Any] = cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=method)
    return resized


def _one(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A single picture as a batch."""
    if not isinstance(picture, np.ndarray) or picture.ndim != 3:
        shape = getattr(picture, "shape", type(picture).__name__)
        raise ValueError(f"picture is {shape}; expected an array (H, W, 3) of uint8, several go to depths or poses")
    return picture[None]


def _check(pictures: NDArray[np.uint8]) -> None:
    if pictures.ndim != 4 or pictures.shape[3] != 3 or 0 in pictures.shape[1:]:
        raise ValueError(f"pictures of shape {pictures.shape}; expected (B, H, W, 3)")
    if pictures.dtype != np.uint8:
        raise ValueError(f"pictures are {pictures.dtype}; expected uint8 from 0 to 255")
