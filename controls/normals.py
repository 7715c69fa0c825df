"""Which way surfaces face, out of a depth map: red is right, green is up, blue is towards the viewer.

Inferred: a depth map says neither how deep the scene is nor what lens saw it, so the map is read as a relief, whose
height the user chooses. Networks that estimate normals directly see finer detail.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image, ImageOps

from scaleweaver.controls.base import Pixels, Preprocessor, at_short_side
from scaleweaver.controls.depth import HUB_MODEL, Depth, DepthMap
from scaleweaver.images import read_image


@dataclass(frozen=True)
class Normals(Preprocessor):
    """model: what estimates the depth, as for `Depth`; "none": the pictures are depth maps themselves, near is bright.

    relief: how far the nearest point stands out above the farthest one, as a part of the short side. smooth: standard
    deviation of the blur before the slope is taken, as a part of the short side too. Depth maps of 16 bits or floats
    are read without loss.
    """

    kind: ClassVar[str] = "normals"

    model: str = HUB_MODEL
    relief: float = 1.0
    smooth: float = 0.01
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("relief", 0, 100)
        self.check_number("smooth", 0, 0.5)
        if self.model != "none":
            Depth(self.model, device=self.device)  # its checks

    def __call__(self, image: Any) -> Image.Image:
        """A picture of any kind -> its normals, RGB, of the same size."""
        if self.model != "none":
            return super().__call__(image)
        depth = read_depth(image)  # (H, W)
        size = depth.shape[::-1]
        if self.detect_resolution is not None:
            depth = np.asarray(at_short_side(Image.fromarray(depth), self.detect_resolution))
        drawn = Image.fromarray(self.draw(depth))
        return drawn if drawn.size == size else drawn.resize(size, Image.Resampling.BICUBIC)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3)."""
        return self.draw(self.network.values(picture))

    def draw(self, depth: DepthMap) -> Pixels:
        """Inverse depth (H, W) from 0 to 1 -> normals (H, W, 3); -1 to 1 becomes 0 to 255."""
        short = min(depth.shape)
        if self.smooth:
            depth = cv2.GaussianBlur(depth, (0, 0), self.smooth * short).astype(np.float32)
        down, right = (np.gradient(depth, axis=axis) if depth.shape[axis] > 1 else 0 * depth for axis in (0, 1))
        # the surface (x, y up, relief * depth) in pixels has the normal (-dz/dx, -dz/dy, 1)
        slope = self.relief * short
        normal = np.stack([-slope * right, slope * down, np.ones_like(depth)], axis=2)  # (H, W, 3)
        normal /= np.linalg.norm(normal, axis=2, keepdims=True)
        return np.round((normal + 1) * 127.5).astype(np.uint8)

    @cached_property
    def network(self) -> Depth:
        """What estimates the depth; loads its own network with the first picture."""
        return Depth(self.model, device=self.device)


def read_depth(image: Any) -> DepthMap:
    """A depth map of any kind -> (H, W) from 0 to 1; 16 bits and floats keep their precision."""
    eight_bit = read_image(image, "depth map").convert("L")  # refuses what is no picture
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as opened:
            image = opened.copy()
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
    values = image.detach().float().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)
    if values.size == eight_bit.width * eight_bit.height:  # one channel, wherever its axis is
        values = values.reshape(eight_bit.height, eight_bit.width)
        if np.issubdtype(values.dtype, np.floating):
            return values.astype(np.float32)
        if values.dtype.itemsize > 1:
            return (values / 65535).astype(np.float32)
    return (np.asarray(eight_bit) / 255).astype(np.float32)


def normals(image: Any, model: str = HUB_MODEL) -> Image.Image:
    """Normals of a picture: `Normals(model)(image)`; keep a `Normals` for many, this loads the network every time."""
    return Normals(model)(image)
