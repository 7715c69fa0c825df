"""The outlines of a picture as somebody would scribble them: few, thick, made of straight strokes; white on black."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from scaleweaver.controls.base import Levels, Pixels, Preprocessor, thicken


@dataclass(frozen=True)
class Scribble(Preprocessor):
    """All but `detail` are parts of the short side, so that all sizes are scribbled alike.

    detail: short side in pixels of the small copy whose outlines are drawn; more pixels see more. shortest: outlines of
    less extent are left out. wobble: how far a stroke may stray from its outline. width: of the pen.
    """

    kind: ClassVar[str] = "scribble"
    levels: ClassVar[Levels] = "two-level"

    detail: int = 96
    shortest: float = 0.1
    wobble: float = 0.01
    width: float = 0.012

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("detail", 16, 1024, whole=True)
        for name in ("shortest", "wobble", "width"):
            self.check_number(name, 0, 0.5)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W) with values 0 and 255 alone."""
        short = min(picture.shape[:2])
        factor = min(1.0, self.detail / short)
        small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else picture
        edges = cv2.Canny(cv2.GaussianBlur(small, (0, 0), 1.0), 50, 150)
        outlines, families = cv2.findContours(edges, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        drawn = np.zeros(picture.shape[:2], np.uint8)
        for i, outline in enumerate(outlines):
            if families[0, i, 3] >= 0:  # the inner side of a line whose outer side is drawn
                continue
            _, _, across, down = cv2.boundingRect(outline)
            if max(across, down) < self.shortest * min(small.shape[:2]):
                continue
            corners = cv2.approxPolyDP(outline, self.wobble * min(small.shape[:2]), closed=True)
            strokes = np.round((corners + 0.5) / factor - 0.5).astype(np.int32)  # (n, 1, 2) in the picture
            cv2.polylines(drawn, [strokes], isClosed=True, color=255)
        return thicken(drawn, round(self.width * short))


def scribble(image: Any) -> Image.Image:
    """A picture as a scribble: `Scribble()(image)`."""
    return Scribble()(image)
