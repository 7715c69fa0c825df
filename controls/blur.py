"""The picture without its details: Gaussian blur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor


@dataclass(frozen=True)
class Blur(Preprocessor):
    """radius: standard deviation of the Gaussian as a part of the short side, so that all sizes blur alike.

    0.02 is 2.6 pixels of 128 and 10 of 512.
    """

    kind: ClassVar[str] = "blur"

    radius: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("radius", 0, 0.5)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3)."""
        sigma = self.radius * min(picture.shape[:2])
        return cv2.GaussianBlur(picture, (0, 0), sigma) if sigma else picture  # cv2 takes 0 for a sigma of its choice


def blur(image: Any, radius: float = 0.02) -> Image.Image:
    """A picture blurred: `Blur(radius)(image)`."""
    return Blur(radius)(image)
