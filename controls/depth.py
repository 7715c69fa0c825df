"""How near everything is: inverse depth, near is bright, stretched per picture to the full range.

Networks come from the Hub through transformers; the built-in world has a small one of its own that needs none, and
knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.controls.base import Pixels, Preprocessor
from scaleweaver.controls.networks import answer, choose_device, load_network, locate_network
from scaleweaver.images import read_image

DepthMap = NDArray[np.float32]
HUB_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
INSTEAD = 'without the Hub there is model="toybox", for pictures of the built-in world'
# families that end in distances; of the others some say so in depth_estimation_type
METRIC_FAMILIES = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")


@dataclass(frozen=True)
class Depth(Preprocessor):
    """model: a Hub id or a folder of transformers' depth estimation, "toybox", or a folder of such an estimator.

    metric: whether the network gives distances in place of inverse depth; None: what its configuration says.
    """

    kind: ClassVar[str] = "depth"

    model: str = HUB_MODEL
    metric: bool | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model or not isinstance(self.model, str):
            raise ValueError(f'depth model={self.model!r}; pass a Hub id, a folder or "toybox"')
        if self.metric not in (None, True, False):
            raise ValueError(f"depth metric={self.metric!r}; pass true, false or nothing")

    def values(self, image: Any) -> DepthMap:
        """A picture of any kind -> inverse depth (H, W) from 0 to 1, near is 1."""
        picture = read_image(image)
        return _resized(self.network(self.at_detect_resolution(picture)), picture.size).clip(0, 1)

    def sixteen_bit(self, image: Any) -> Image.Image:
        """A picture of any kind -> its depth as a PIL image of mode "I;16"; `save` writes a 16-bit PNG."""
        return Image.fromarray(np.round(self.values(image) * 65535).astype(np.uint16))

    def detect(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (H, W)."""
        return np.round(self.network(picture) * 255).astype(np.uint8)

    @cached_property
    def network(self) -> Callable[[Pixels], DepthMap]:
        """(H, W, 3) -> inverse depth (H, W) from 0 to 1; loaded when it is first asked for."""
        if self.model == "toybox":
            return _toybox_depth(None, self.device)
        folder, config = locate_network(self.model, built_in=("toybox",), instead=INSTEAD)
        if config.get("_class_name") == "ToyboxEstimator":
            return _toybox_depth(folder, self.device)
        return _TransformersDepth(self.model, folder, config, self.metric, self.device)


def _toybox_depth(folder: Path | None, device: str) -> Callable[[Pixels], DepthMap]:
    """The estimator of the built-in world: that of a folder, or the one that ships."""
    from scaleweaver.controls.estimator import ToyboxEstimator

    target = choose_device(device)
    estimator: Any = ToyboxEstimator.built_in() if folder is None else ToyboxEstimator.from_pretrained(folder)
    estimate: Callable[[Pixels], DepthMap] = estimator.eval().to(target).depth
    return estimate


class _TransformersDepth:
    """A network of transformers' depth estimation."""

    def __init__(self, model: str, folder: Path, config: dict[str, Any], metric: bool | None, device: str) -> None:
        from transformers import AutoModelForDepthEstimation
        from transformers.utils import is_torchvision_available

        if config.get("model_type") == "zoedepth" and not is_torchvision_available():
            raise ValueError(f"{model!r} is a ZoeDepth, which transformers reads with torchvision alone; install that")
        self.model = model
        self.processor, self.network = load_network(model, folder, AutoModelForDepthEstimation, device)
        by_config = config.get("depth_estimation_type") == "metric" or config.get("model_type") in METRIC_FAMILIES
        self.metric = by_config if metric is None else metric

    def __call__(self, picture: Pixels) -> DepthMap:
        outputs = answer(self.model, self.processor, self.network, picture)
        # takes off the margins that some families put around a picture; others end in inverse depth until here
        (found,) = self.processor.post_process_depth_estimation(outputs, [picture.shape[:2]])
        depth = found["predicted_depth"].reshape(picture.shape[:2]).float().cpu().numpy()  # (H, W)
        if self.metric:
            depth = 1 / np.maximum(depth, 1e-3)
        low, high = float(depth.min()), float(depth.max())
        stretched: DepthMap = (depth - low) / max(high - low, 1e-12)
        return stretched


def _resized(depth: DepthMap, size: tuple[int, int]) -> DepthMap:
    """Depth (H, W) at (width, height)."""
    if depth.shape == size[::-1]:
        return depth
    return np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.BICUBIC))


def depth(image: Any, model: str = HUB_MODEL) -> Image.Image:
    """Depth map of a picture: `Depth(model)(image)`; keep a `Depth` for many, this loads the network every time."""
    return Depth(model)(image)
