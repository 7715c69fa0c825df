"""The map of a photo made as a control's training maps were: same detector, thresholds and size."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

from scaleweaver.controls import preprocessor
from scaleweaver.controls.base import Preprocessor, at_short_side
from scaleweaver.images import read_image
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig

WITH_MODEL = ("depth", "pose", "normals", "segmentation", "softedge")  # kinds that several detectors make


def map_of_photo(photo: Any, config: ScaleWeaverConfig, side: int | None = None) -> Image.Image:
    """The map of a photo for a control, at the short side `side`, else the control's own, else the photo's."""
    detect = detector_of(config)
    picture = read_image(photo, f"control {config.kind!r}")
    side = side or config.resolution
    return detect(at_short_side(picture, side) if side else picture)


def detector_of(config: ScaleWeaverConfig) -> Preprocessor:
    """The preprocessor that a control's record describes.

    detector is "toybox-..." for the built-in world's own networks, "palette-8" for a number of cells, or the `model` of
    a preprocessor that has one: "blazepose", "hed", a Hub id; thresholds are those of canny.
    """
    settings: dict[str, Any] = {}
    if config.kind == "canny":
        settings = dict(zip(("low", "high"), config.thresholds, strict=False))
    elif config.detector.startswith("toybox"):
        settings["model"] = "toybox"
    elif cells := re.fullmatch(r"palette-(\d+)", config.detector):
        settings["cells"] = int(cells[1])
    elif "/" in config.detector or (config.detector and config.kind in WITH_MODEL):
        settings["model"] = config.detector
    return preprocessor(config.kind, **settings)
