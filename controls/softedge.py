"""Edges with a strength, white on black: what stands out strongly is bright, at several scales at once.

"classical" is the gradient of the picture smoothed three times, without any network. "hed" is holistically-nested edge
detection (Xie and Tu, arXiv 1504.06375), whose weights are downloaded on first use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor
from scaleweaver.controls.networks import choose_device

if TYPE_CHECKING:
    from scaleweaver.controls.hed import Hed

_WIDTHS = (0.003, 0.006, 0.012)  # of the Gaussians, as parts of the short side


@dataclass(frozen=True)
class SoftEdge(Preprocessor):
    """model: "classical" or "hed". gain: a step of 1 / gain of the full range is already white (classical alone)."""

    kind: ClassVar[str] = "softedge"

    model: str = "classical"
    gain: float = 2.0
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("model", ("classical", "hed"))
        self.check_number("gain", 0.1, 100)

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W)."""
        if self.model == "classical":
            edges = (step_heights(picture) * self.gain).clip(0, 1)
        else:
            edges = self.network.edges(picture)
        return np.round(edges * 255).astype(np.uint8)

    @cached_property
    def network(self) -> Hed:
        """HED, loaded when it is first asked for."""
        from scaleweaver.controls.hed import Hed

        device = choose_device(self.device)
        try:
            return Hed.load(device)
        except (ValueError, OSError) as error:  # no h5py, no connection
            raise OSError(f'{error}; or take model="classical", which needs no weights') from error


def step_heights(picture: Pixels) -> NDArray[np.float32]:
    """About how high the step at each pixel is, (H, W): of the strongest colour, mean over three smoothings."""
    values = picture.astype(np.float32) / 255
    heights = np.zeros(picture.shape[:2], np.float32)
    for width in _WIDTHS:
        sigma = max(0.8, width * min(picture.shape[:2]))
        smooth = cv2.GaussianBlur(values, (0, 0), sigma)
        # Scharr's kernels sum up 32 times the slope; a smoothed step of height 1 has the slope 1 / (sigma sqrt(2 pi))
        right, down = cv2.Scharr(smooth, cv2.CV_32F, 1, 0) / 32, cv2.Scharr(smooth, cv2.CV_32F, 0, 1) / 32
        heights += np.hypot(right, down).max(axis=2) * (sigma * math.sqrt(2 * math.pi)) / len(_WIDTHS)
    return heights


def softedge(image: Any, model: str = "classical") -> Image.Image:
    """Soft edges of a picture: `SoftEdge(model)(image)`; keep a `SoftEdge("hed")` for many pictures."""
    return SoftEdge(model)(image)
