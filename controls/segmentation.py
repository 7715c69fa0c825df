"""What is where: classes of things as flat colours.

Networks come from the Hub through transformers. The default, UPerNet on ConvNeXt-small, knows the 150 classes of
ADE20K. Class i has the i-th colour of the PASCAL VOC colour map, whatever the network: see `class_colors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.controls.base import Levels, Pixels, Preprocessor
from scaleweaver.controls.networks import answer, load_network, locate_network
from scaleweaver.images import read_image

HUB_MODEL = "openmmlab/upernet-convnext-small"
INSTEAD = "without the Hub, `palette` says which colours are where, and renders of the built-in world have exact masks"
# families that find masks of things first and then say what each is
MASK_FAMILIES = ("detr", "eomt", "eomt_dinov3", "mask2former", "maskformer")
_MOST_PIXELS = 1_000_000  # of the answer, which takes one number per class and pixel on its way; networks know fewer


@dataclass(frozen=True)
class Segmentation(Preprocessor):
    """model: a Hub id or a folder of transformers' semantic segmentation, Mask2Former and its kin too."""

    kind: ClassVar[str] = "segmentation"
    levels: ClassVar[Levels] = "flat"

    model: str = HUB_MODEL
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model or not isinstance(self.model, str):
            raise ValueError(f"segmentation model={self.model!r}; pass a Hub id or a folder")

    def classes(self, image: Any) -> NDArray[np.int32]:
        """A picture of any kind -> the class (H, W) of every pixel at the resolution of the detection."""
        return self._classes(self.at_detect_resolution(read_image(image)))

    def names(self) -> dict[int, str]:
        """What each class is called; loads the network."""
        return {int(index): str(name) for index, name in self.network[1].config.id2label.items()}

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W, 3)."""
        classes = self._classes(picture)
        colors: Pixels = class_colors(int(classes.max()) + 1)[classes]
        return colors

    def _classes(self, picture: Pixels) -> NDArray[np.int32]:
        processor, network = self.network
        outputs = answer(self.model, processor, network, picture)
        height, width = picture.shape[:2]
        factor = min(1.0, (_MOST_PIXELS / (height * width)) ** 0.5)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        classes = found.cpu().numpy().astype(np.int32)
        return np.asarray(cv2.resize(classes, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))  # (H, W)

    @cached_property
    def network(self) -> tuple[Any, Any]:
        """(image processor, network), loaded when they are first asked for."""
        from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

        folder, config = locate_network(self.model, built_in=(), instead=INSTEAD)
        by_masks = config.get("model_type") in MASK_FAMILIES
        auto = AutoModelForUniversalSegmentation if by_masks else AutoModelForSemanticSegmentation
        return load_network(self.model, folder, auto, self.device)


def class_colors(count: int) -> Pixels:
    """The colours (count, 3) of the PASCAL VOC map: bits 0, 3, 6.. of the class are red's highest bits downwards.

    Bits 1, 4, 7.. are those of green, 2, 5, 8.. those of blue: class 0 is black, class 1 dark red, class 2 dark green.
    """
    classes = np.arange(count)
    bits = classes[:, None, None] >> np.arange(24).reshape(8, 3) & 1  # (count, 8, 3)
    colors: Pixels = (bits << np.arange(7, -1, -1)[:, None]).sum(axis=1).astype(np.uint8)
    return colors  # (count, 3)


def segmentation(image: Any, model: str = HUB_MODEL) -> Image.Image:
    """Classes of a picture as colours: `Segmentation(model)(image)`; keep a `Segmentation` for many."""
    return Segmentation(model)(image)
