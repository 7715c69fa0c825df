"""What all preprocessors share: any picture in, an RGB control map of the same size out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.images import MAX_PIXELS, read_image

Pixels = NDArray[Any]  # uint8, red first; cv2 promises no dtype
# what a map's values mean when it is resized: tones may be mixed, the colours of flat areas and black and white not
Levels = Literal["smooth", "flat", "two-level"]
_RESAMPLING = {
    "smooth": Image.Resampling.BICUBIC,
    "flat": Image.Resampling.NEAREST,
    "two-level": Image.Resampling.NEAREST,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessor(ABC):
    """One kind of control map with its settings; call it with a picture.

    detect_resolution: short side in pixels at which the detection runs, after which the map is brought back to the
    picture's size; None for the picture's own. Detectors find other things at other sizes: keep to what an adapter
    was trained with.
    """

    kind: ClassVar[str]
    levels: ClassVar[Levels] = "smooth"

    detect_resolution: int | None = None

    def __post_init__(self) -> None:
        if self.detect_resolution is not None:
            self.check_number("detect_resolution", 1, 8192, whole=True)

    def __call__(self, image: Any) -> Image.Image:
        """A picture of any kind -> its control map, RGB, of the same size."""
        picture = read_image(image)
        made = Image.fromarray(self.detect(self.at_detect_resolution(picture)))
        if made.size != picture.size:
            made = made.resize(picture.size, _RESAMPLING[self.levels])
        return made.convert("RGB")

    @abstractmethod
    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> map (H, W) or (H, W, 3)."""

    def unload(self) -> None:
        """Forget the network, if one was loaded; the next picture loads it again."""
        self.__dict__.pop("network", None)  # where a cached_property of that name keeps it

    def at_detect_resolution(self, picture: Image.Image) -> Pixels:
        """The pixels (H, W, 3) that the detection reads."""
        return np.asarray(picture if self.detect_resolution is None else at_short_side(picture, self.detect_resolution))

    def check_number(self, name: str, least: float, most: float, *, whole: bool = False) -> None:
        """Refuse a setting that is not a number from `least` to `most`."""
        value = getattr(self, name)
        if not is_number(value, whole=whole) or not least <= value <= most:
            number = "whole number" if whole else "number"
            raise ValueError(f"{self.kind} {name}={value!r}; pass a {number} from {least:g} to {most:g}")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Refuse a setting that is none of `choices`."""
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{self.kind} {name}={value!r}; pass {' or '.join(map(repr, choices))}")


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a setting is a finite number, numpy's included; booleans are none."""
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)


def at_short_side(picture: Image.Image, side: int) -> Image.Image:
    """The picture at another size of the same shape, its short side `side` pixels long."""
    factor = side / min(picture.size)
    width, height = (round(length * factor) for length in picture.size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"a picture of {picture.width}x{picture.height} would be {width}x{height} at a short side of {side};"
            " cut it to a shape that is less long, or lower the resolution"
        )
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def thicken(drawn: Pixels, pixels: int) -> Pixels:
    """Lines of one pixel (H, W) drawn with a round pen of so many; cv2's own thick lines are wider than asked."""
    if pixels <= 1:
        return drawn
    return cv2.dilate(drawn, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (pixels, pixels)))
