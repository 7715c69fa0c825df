"""ComfyUI's layouts, IMAGE (B, H, W, C) and MASK (B, H, W), both float in 0..1, to what scaleweaver reads and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scaleweaver.images import read_image


def pictures_of(image: Tensor) -> list[Image.Image]:
    """IMAGE -> RGB pictures; values beyond 0..1, which upscalers leave, are cut off."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image has shape {tuple(image.shape)}; expected (B, H, W, 1, 3 or 4)")
    return [read_image(row.detach().float().clamp(0, 1).cpu().numpy()) for row in image]


def masks_of(mask: Tensor) -> list[Image.Image]:
    """MASK -> pictures, white where it is 1."""
    if mask.ndim not in (2, 3):
        raise ValueError(f"a mask has shape {tuple(mask.shape)}; expected (B, H, W)")
    return pictures_of((mask if mask.ndim == 3 else mask[None])[..., None])


def image_of(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> IMAGE."""
    rows = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(rows))  # (B, H, W, 3)
