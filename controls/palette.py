"""Where which colours are: the mean colour of every cell of a coarse grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
from PIL import Image

from scaleweaver.controls.base import Levels, Pixels, Preprocessor


@dataclass(frozen=True)
class Palette(Preprocessor):
    """cells: how many lie along the short side; as many of about the same shape as fit along the long one."""

    kind: ClassVar[str] = "palette"
    levels: ClassVar[Levels] = "flat"

    cells: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("cells", 1, 512, whole=True)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3) with one colour per cell: shrunk by area, brought back by nearest."""
        height, width = picture.shape[:2]
        short = min(height, width)
        cells = min(self.cells, short)  # a cell is at least a pixel
        rows, columns = (max(1, round(side * cells / short)) for side in (height, width))
        means = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)  # (rows, columns, 3)
        return cv2.resize(means, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def palette(image: Any, cells: int = 8) -> Image.Image:
    """Coarse colours of a picture: `Palette(cells)(image)`."""
    return Palette(cells)(image)
