"""A drawing of the picture in white lines on black: the dark side of every contrast, as ink would be laid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor


@dataclass(frozen=True)
class Lineart(Preprocessor):
    """Difference of Gaussians: what is darker than its surroundings.

    width: standard deviation of the wider Gaussian as a part of the short side. contrast: the dark side of a step of
    that much of the full range is white, of a lower one grey.
    """

    kind: ClassVar[str] = "lineart"

    width: float = 0.006
    contrast: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("width", 0.001, 0.2)
        self.check_number("contrast", 0.01, 1)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W)."""
        sigma = max(1.2, self.width * min(picture.shape[:2]))
        values = picture.astype(np.float32) / 255
        # 1.6 is the ratio at which the difference is closest to a Laplacian; 0.11 is what it leaves of a step
        darker = cv2.GaussianBlur(values, (0, 0), sigma) - cv2.GaussianBlur(values, (0, 0), sigma / 1.6)
        ink: Pixels = 1.2 * darker.max(axis=2) / (0.11 * self.contrast) - 0.2  # (H, W); the offset swallows noise
        return np.round(ink.clip(0, 1) * 255).astype(np.uint8)


def lineart(image: Any) -> Image.Image:
    """A picture as a line drawing: `Lineart()(image)`."""
    return Lineart()(image)
