"""The picture without its colours, as something to colour in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor


@dataclass(frozen=True)
class Grey(Preprocessor):
    """Luma as in ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""

    kind: ClassVar[str] = "grey"

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W)."""
        return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def grey(image: Any) -> Image.Image:
    """A picture in tones of grey: `Grey()(image)`."""
    return Grey()(image)
