"""The straight lines of a picture, white on black: buildings, rooms, furniture.

OpenCV's line segment detector, LSD (von Gioi and others, "LSD: a Line Segment Detector", IPOL 2012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from scaleweaver.controls.base import Levels, Pixels, Preprocessor, thicken


@dataclass(frozen=True)
class Lines(Preprocessor):
    """shortest: lines of less length are left out. width: of the pen. Both are parts of the short side."""

    kind: ClassVar[str] = "lines"
    levels: ClassVar[Levels] = "two-level"

    shortest: float = 0.1
    width: float = 0.006

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("shortest", 0, 2)
        self.check_number("width", 0, 0.5)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W) with values 0 and 255 alone."""
        drawn = np.zeros(picture.shape[:2], np.uint8)
        for start, end in self.segments(picture):
            first, last = (tuple(int(v) for v in np.round(point)) for point in (start, end))
            cv2.line(drawn, first, last, 255)
        return thicken(drawn, round(self.width * min(drawn.shape)))

    def segments(self, picture: Pixels) -> list[tuple[Any, Any]]:
        """(H, W, 3) -> the (x, y) of start and end of every line that is long enough."""
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        found = cv2.createLineSegmentDetector().detect(grey)[0]
        if found is None:
            return []
        ends = found.reshape(-1, 2, 2)  # (n, start and end, xy)
        lengths = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
        return [(start, end) for start, end in ends[lengths >= self.shortest * min(grey.shape)]]


def lines(image: Any) -> Image.Image:
    """Straight lines of a picture: `Lines()(image)`."""
    return Lines()(image)
