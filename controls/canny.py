"""Edges by Canny's detector, white on black.

OpenCV on the RGB picture itself: it follows the strongest of the three gradients. Edges of the grey version are others
(the two agree with F1 = 0.8 only), and so are edges taken at another size: keep to what an adapter was trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from scaleweaver.images import read_image


@dataclass(frozen=True)
class Canny:
    """Thresholds of the gradient (L1 norm of the 3x3 Sobel pair): edges start above `high` and go on above `low`."""

    low: float = 100
    high: float = 200

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"canny threshold {name}={value!r}; pass a number of at least 0, usually 50 to 300")
        if self.low > self.high:
            raise ValueError(f"canny threshold low={self.low} is above high={self.high}; swap them")

    def __call__(self, image: Any) -> Image.Image:
        """A picture of any kind -> RGB edge map of the same size with values 0 and 255 alone."""
        picture = np.asarray(read_image(image))  # (H, W, 3)
        edges = cv2.Canny(picture, self.low, self.high)  # (H, W)
        return Image.fromarray(edges).convert("RGB")


def canny(image: Any, low: float = 100, high: float = 200) -> Image.Image:
    """Edge map of a picture: `Canny(low, high)(image)`."""
    return Canny(low, high)(image)
