"""Edges by Canny's detector, white on black.

OpenCV on the RGB picture itself: it follows the strongest of the three gradients. Edges of the grey version are others
(the two agree with F1 = 0.8 only), and so are edges taken at another size: keep to what an adapter was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
from PIL import Image

from scaleweaver.controls.base import Levels, Pixels, Preprocessor, is_number


@dataclass(frozen=True)
class Canny(Preprocessor):
    """Thresholds of the gradient (L1 norm of the 3x3 Sobel pair): edges start above `high` and go on above `low`."""

    kind: ClassVar[str] = "canny"
    levels: ClassVar[Levels] = "two-level"

    low: float = 100
    high: float = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(f"canny threshold {name}={value!r}; pass a number of at least 0, usually 50 to 300")
        if self.low > self.high:
            raise ValueError(f"canny threshold low={self.low} is above high={self.high}; swap them")

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W) with values 0 and 255 alone."""
        return cv2.Canny(picture, self.low, self.high)


def canny(image: Any, low: float = 100, high: float = 200) -> Image.Image:
    """Edge map of a picture: `Canny(low, high)(image)`."""
    return Canny(low, high)(image)
