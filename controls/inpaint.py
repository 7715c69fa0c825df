"""The picture with the part to be drawn anew painted over in one colour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor, is_number
from scaleweaver.images import fit, read_image

MARK = (255, 0, 255)  # magenta, which photos rarely hold


@dataclass(frozen=True)
class Inpaint(Preprocessor):
    """mask: a picture of any kind and of the photo's size, white where it is to be drawn anew. color: RGB of the mark.

    A pixel is marked as a whole, from half white on.
    """

    kind: ClassVar[str] = "inpaint"

    mask: Any = field(hash=False)  # pictures are compared by their pixels, and have no hash
    color: tuple[int, int, int] = MARK

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = tuple(self.color) if isinstance(self.color, tuple | list) else ()
        if len(channels) != 3 or not all(is_number(c, whole=True) and 0 <= c <= 255 for c in channels):
            raise ValueError(
                f"inpaint color={self.color!r}; pass red, green and blue from 0 to 255, for example {MARK}"
            )
        object.__setattr__(self, "mask", read_image(self.mask, "inpaint mask").convert("L"))
        object.__setattr__(self, "color", channels)

    def __call__(self, image: Any) -> Image.Image:
        """A picture of any kind -> the same with the masked part painted over."""
        picture = read_image(image)
        if picture.size != self.mask.size:
            raise ValueError(
                f"inpaint mask is {self.mask.width}x{self.mask.height} but the picture is"
                f" {picture.width}x{picture.height}; make them the same size"
            )
        return super().__call__(picture)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3)."""
        height, width = picture.shape[:2]
        masked = np.asarray(fit(self.mask, height, width, "stretch", lines=False)) >= 128  # (H, W)
        marked = picture.copy()
        marked[masked] = self.color
        return marked


def inpaint(image: Any, mask: Any) -> Image.Image:
    """A picture with its masked part painted over: `Inpaint(mask)(image)`."""
    return Inpaint(mask)(image)
