"""People's poses as OpenPose-style skeletons, coloured on black, and as key points.

BlazePose needs no Hub: its weights come out of a published wheel; it looks for a few large people. ViTPose comes from
the Hub, with a detector for as many as there are. The built-in world has a small network of its own, which knows
nothing else. And skeletons that somebody edited are drawn from OpenPose JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.controls import openpose
from scaleweaver.controls.base import Pixels, Preprocessor
from scaleweaver.controls.networks import choose_device
from scaleweaver.controls.vitpose import HUB_DETECTOR, HUB_MODEL, VitPose
from scaleweaver.images import read_image

KeyPoints = NDArray[np.float32]


@dataclass(frozen=True)
class Pose(Preprocessor):
    """model: "blazepose", "vitpose", "toybox", or the Hub id or folder of a ViTPose.

    threshold: confidence above which a joint is drawn. people: the most that are looked for. detector: Hub id or folder
    of transformers' object detection that finds the people for ViTPose.
    """

    kind: ClassVar[str] = "pose"

    model: str = "blazepose"
    threshold: float = 0.3
    people: int = 10
    detector: str = HUB_DETECTOR
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("threshold", 0, 1)
        self.check_number("people", 1, 100, whole=True)
        if not self.model or not isinstance(self.model, str):
            raise ValueError(
                f'pose model={self.model!r}; pass "blazepose", "vitpose", "toybox", a Hub id or the folder of a ViTPose'
            )

    def __call__(self, image: Any) -> Image.Image:
        """A picture of any kind, or OpenPose JSON -> skeletons on black, RGB, of the same size."""
        if openpose.is_json(image):
            return self.draw(image)
        picture = read_image(image)
        return self._drawn(self.keypoints(picture), (picture.height, picture.width))

    def keypoints(self, image: Any) -> KeyPoints:
        """A picture of any kind -> (people, 18, 3) in COCO-18 order: x and y in pixels of it, and a confidence.

        Joints behind something or beyond the picture's border are estimated too, with little confidence.
        """
        picture = read_image(image)
        pixels = self.at_detect_resolution(picture)
        points = self.network(pixels, self.people).copy()
        points[..., :2] *= np.array(picture.size) / (pixels.shape[1], pixels.shape[0])
        return points

    def to_json(self, image: Any) -> dict[str, Any]:
        """A picture of any kind -> its key points as OpenPose JSON."""
        picture = read_image(image)
        return openpose.to_json(self.keypoints(picture), (picture.height, picture.width))

    def draw(
        self, record: Mapping[str, Any] | str | os.PathLike[str], size: tuple[int, int] | None = None
    ) -> Image.Image:
        """OpenPose JSON as a dict, text or file -> skeletons of its canvas, or scaled to `size`, (height, width)."""
        return self._drawn(*openpose.from_json(record, size))

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> skeletons (H, W, 3)."""
        return openpose.draw_skeleton(self.network(picture, self.people), picture.shape[:2], self.threshold)

    @cached_property
    def network(self) -> Callable[[Pixels, int], KeyPoints]:
        """(H, W, 3), most people -> (people, 18, 3); loaded when it is first asked for."""
        if self.model == "blazepose":
            from scaleweaver.controls.blazepose import BlazePose

            return BlazePose.load(choose_device(self.device)).keypoints
        if self.model == "toybox":
            from scaleweaver.controls.estimator import ToyboxEstimator

            estimator = ToyboxEstimator.built_in(choose_device(self.device))
            return lambda picture, people: estimator.keypoints(picture)[:people]
        return VitPose(HUB_MODEL if self.model == "vitpose" else self.model, self.detector, self.device).keypoints

    def _drawn(self, points: KeyPoints, size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(openpose.draw_skeleton(points, size, self.threshold))


def pose(image: Any, model: str = "blazepose", threshold: float = 0.3) -> Image.Image:
    """Skeletons of a picture, or of OpenPose JSON: `Pose(model, threshold)(image)`.

    Keep a `Pose` for many pictures: this loads the networks every time.
    """
    return Pose(model, threshold)(image)
