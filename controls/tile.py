"""The picture without its fine details, to have them drawn anew: shrunk, and brought back smoothly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor


@dataclass(frozen=True)
class Tile(Preprocessor):
    """factor: how many pixels along each side become one; those of `detect_resolution`, where that is given."""

    kind: ClassVar[str] = "tile"

    factor: float = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("factor", 1, 64)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3)."""
        height, width = picture.shape[:2]
        small = (max(1, round(width / self.factor)), max(1, round(height / self.factor)))
        shrunk = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def tile(image: Any, factor: float = 4) -> Image.Image:
    """A picture at a coarser resolution: `Tile(factor)(image)`."""
    return Tile(factor)(image)
