"""ViTPose, key points by networks of the Hub, through transformers: a detector finds people, ViTPose their joints.

"ViTPose: Simple Vision Transformer Baselines for Human Pose Estimation", arXiv:2204.12484. Cutting out follows
arXiv:1911.07524 and the places between the cells of a heat map arXiv:1910.06278, as it does in transformers, whose own
image processor for it needs scipy.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.controls.networks import choose_device, load_network, locate_network
from scaleweaver.controls.openpose import from_coco_17

HUB_MODEL = "usyd-community/vitpose-base-simple"
HUB_DETECTOR = "PekingU/rtdetr_r50vd_coco_o365"
INSTEAD = 'without the Hub there is model="blazepose", and model="toybox" for pictures of the built-in world'

Array = NDArray[np.float32]
_PERSON = 0.3  # probability from which a person is one
_MARGIN = 1.25  # of the cut-out around a person's box
# what ImageNet's pictures have, which the networks were trained with
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VitPose:
    """Both networks, by Hub id or folder."""

    def __init__(self, model: str = HUB_MODEL, detector: str = HUB_DETECTOR, device: str = "auto") -> None:
        from transformers import AutoModelForObjectDetection, VitPoseForPoseEstimation

        # both are looked for before one of them is loaded
        folder, config = locate_network(model, built_in=("blazepose", "toybox"), instead=INSTEAD)
        if config.get("model_type") != "vitpose":
            raise ValueError(f"pose model={model!r} is a {config.get('model_type')}, expected a vitpose; {INSTEAD}")
        found_in, _ = locate_network(detector, built_in=(), instead=INSTEAD)
        self.processor, self.detector = load_network(detector, found_in, AutoModelForObjectDetection, device)
        labels = {int(number): str(name).lower() for number, name in self.detector.config.id2label.items()}
        self.person = [number for number, name in labels.items() if name == "person"]
        if not self.person:
            raise ValueError(f"detector {detector!r} knows no person; pass one trained on COCO, {HUB_DETECTOR!r} say")
        network = VitPoseForPoseEstimation.from_pretrained(folder, use_safetensors=True)
        if network.config.num_labels != 17:
            raise ValueError(f"{model!r} finds {network.config.num_labels} points; expected the 17 of COCO")
        self.network = network.eval().to(choose_device(device))

    def keypoints(self, picture: NDArray[np.uint8], people: int = 10) -> Array:
        """(people, 18, 3) in COCO-18 order of a picture (H, W, 3), the surest first: x and y in pixels, confidence."""
        import torch

        boxes = self.detect(picture)[:people]
        if not len(boxes):
            return np.zeros((0, 18, 3), np.float32)
        backbone = self.network.config.backbone_config
        height, width = backbone.image_size
        frames = [frame(box, width / height) for box in boxes]
        cuts = np.stack([cut(picture, each, width, height) for each in frames])  # (people, H, W, 3)
        pixels = torch.from_numpy((cuts / np.float32(255) - _MEAN) / _SPREAD).float().permute(0, 3, 1, 2)
        # of the networks that were trained on several data sets, COCO's part is the first
        experts = torch.zeros(len(cuts), dtype=torch.long) if backbone.num_experts > 1 else None
        with torch.inference_mode():
            heat = self.network(
                pixel_values=pixels.to(self.network.device),
                dataset_index=None if experts is None else experts.to(self.network.device),
            ).heatmaps
        points = peaks(heat.float().cpu().numpy())  # (people, 17, 3)
        cells = np.array([heat.shape[3] - 1, heat.shape[2] - 1])
        for person, (x, y, w, h) in zip(points, frames, strict=True):
            person[:, :2] = person[:, :2] / cells * (w, h) + (x, y)
        return from_coco_17(points)

    def detect(self, picture: NDArray[np.uint8]) -> Array:
        """Boxes (people, 4) as x0, y0, x1, y1 in pixels, the surest first."""
        import torch

        inputs = self.processor(images=Image.fromarray(picture), return_tensors="pt").to(self.detector.device)
        with torch.inference_mode():
            answer = self.detector(**inputs)
        sizes = torch.tensor([picture.shape[:2]])
        found: dict[str, Any] = self.processor.post_process_object_detection(answer, _PERSON, sizes)[0]
        of_people = [label in self.person for label in found["labels"].tolist()]
        boxes, scores = (found[name].float().cpu().numpy()[of_people] for name in ("boxes", "scores"))
        chosen: Array = boxes[np.argsort(-scores, kind="stable")]
        return chosen


def frame(box: Array, aspect: float) -> tuple[float, float, float, float]:
    """x, y, width and height of what is cut out for a box: the same middle, the network's aspect, and a margin."""
    x0, y0, x1, y1 = (float(side) for side in box)
    height = max(y1 - y0, (x1 - x0) / aspect) * _MARGIN
    width = height * aspect
    return (x0 + x1 - width) / 2, (y0 + y1 - height) / 2, width, height


def cut(
    picture: NDArray[np.uint8], where: tuple[float, float, float, float], width: int, height: int
) -> NDArray[np.uint8]:
    """The pixels of a frame, (height, width, 3), black beyond the picture; the outer pixels lie on its edges."""
    x, y, w, h = where
    matrix = np.array([[w / (width - 1), 0, x], [0, h / (height - 1), y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(picture, matrix, (width, height), flags=flags), np.uint8)


def peaks(heat: Array) -> Array:
    """Heat maps (B, N, h, w) -> (B, N, 3): x and y of the highest place in cells, and its height.

    Between cells the logarithm of the map counts as a parabola, the logarithm of a Gaussian (arXiv:1910.06278, eq. 9).
    """
    batch, count, height, width = heat.shape
    flat = heat.reshape(batch, count, -1)
    rows, columns = np.divmod(flat.argmax(2), width)  # (B, N)
    smooth = np.stack([cv2.GaussianBlur(each, (3, 3), 0.8) for each in heat.reshape(-1, height, width)])
    log = np.log(smooth.clip(1e-3, 50)).reshape(batch, count, height, width)
    log = np.pad(log, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    images, points = np.ogrid[:batch, :count]

    def near(down: int, right: int) -> Array:
        """The logarithm beside the highest cell, (B, N)."""
        value: Array = log[images, points, rows + 1 + down, columns + 1 + right]
        return value

    gradient = np.stack([near(0, 1) - near(0, -1), near(1, 0) - near(-1, 0)], axis=-1) / 2  # (B, N, 2)
    xx, yy = near(0, 1) - 2 * near(0, 0) + near(0, -1), near(1, 0) - 2 * near(0, 0) + near(-1, 0)
    xy = (near(1, 1) - near(1, -1) - near(-1, 1) + near(-1, -1)) / 4
    curvature = np.stack([xx, xy, xy, yy], axis=-1).reshape(batch, count, 2, 2)
    # where a map is flat there is no peak between cells
    peaked = (xx < 0) & (yy < 0) & (xx * yy - xy**2 > 1e-6)
    curvature[~peaked] = -np.eye(2)
    shift = -np.linalg.solve(curvature, gradient[..., None])[..., 0].clip(-1, 1)
    shift[~peaked] = 0
    places = np.stack([columns, rows], axis=-1) + shift
    return np.concatenate([places, flat.max(2)[..., None].clip(0, 1)], axis=-1).astype(np.float32)
