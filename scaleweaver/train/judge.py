"""Recipe "judge": the detector that scores generated pictures, on renders that no generator was trained on.

Objects as Points (arXiv 1904.07850): focal loss on heat maps with a Gaussian around each centre; colour, clothes, pose
and places at the centres. Half of the pictures are softened as a tokenizer softens them, so that blur is not read as
absence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaleweaver.evaluate.attributes import PERSON, STRIDE, AttributeJudge, score
from scaleweaver.toybox.compose import rectangle
from scaleweaver.toybox.scene import Person, Scene, attributes, base
from scaleweaver.toybox.stage import project
from scaleweaver.toybox.worlds import check_same_world
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Pixels, Renders, to_images

SPREAD = 0.7  # standard deviation of the Gaussian around a centre, in cells
WEIGHTS = {"heat": 1.0, "color": 1.0, "trousers": 0.5, "pose": 0.5, "place": 1.0, "ground": 0.2, "sky": 0.2}


@dataclass(frozen=True)
class Labels:
    """What a judge should say of one picture; -1 where the question does not apply."""

    items: np.ndarray  # (items, 4) int: kind, colour or shirt, trousers, pose
    places: np.ndarray  # (items, 3) x, y of the centre and y of the base, fractions of the picture
    ground: int
    sky: int


def labels_of(scene: Scene, judge: AttributeJudge) -> Labels:
    """Names as numbers of this judge, places through the scene's camera."""
    names = judge.config
    check_same_world("this judge", names["world"], scene.version)
    items, places = [], []
    for item in scene.items:
        left, bottom, right, top = rectangle(item, scene.camera)
        foot = project(np.array([[item.x, item.y, base(item)]]), scene.camera)[0]
        places.append((0.5 + (left + right) / 4, 0.5 - (bottom + top) / 4, foot[1]))
        if isinstance(item, Person):
            looks = (
                names["colors"].index(item.shirt),
                names["colors"].index(item.trousers),
                names["poses"].index(item.pose),
            )
            items.append((names["kinds"].index(PERSON), *looks))
        else:
            items.append((names["kinds"].index(item.kind), names["colors"].index(item.color), -1, -1))
    ground, sky = names["grounds"].index(scene.ground), names["skies"].index(scene.sky)
    return Labels(np.array(items), np.array(places, np.float32), ground, sky)


class JudgeLoss(nn.Module):
    """Sum of the losses of all answers; forward({"images", "heat", "items", "places", "picture", "ground", "sky"},
    seed).
    """

    def __init__(self, judge: AttributeJudge):
        super().__init__()
        self.judge = judge

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        out = {name: value.float() for name, value in self.judge(batch["images"]).items()}
        height, width = out["heat"].shape[2:]
        x, y, foot = batch["places"].unbind(1)  # (N,) each, N items of all pictures
        column, row = (x * width).long().clamp(0, width - 1), (y * height).long().clamp(0, height - 1)
        at = (batch["picture"], slice(None), row, column)
        offsets = torch.stack([x * width - column, y * height - row, foot * height - row], dim=1) - 0.5  # (N, 3)
        losses = {"heat": focal(out["heat"], batch["heat"]), "place": F.smooth_l1_loss(out["place"][at], offsets)}
        for number, name in enumerate(("color", "trousers", "pose"), start=1):
            wanted = batch["items"][:, number]
            # a sum over the known ones: a batch without people must not divide by zero
            entropy = F.cross_entropy(out[name][at], wanted, ignore_index=-1, reduction="sum")
            losses[name] = entropy / (wanted >= 0).sum().clamp(min=1)
        for name in ("ground", "sky"):
            losses[name] = F.cross_entropy(out[name], batch[name])
        loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        return loss, {name: value.detach() for name, value in losses.items()}


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Penalty-reduced focal loss (equation 1) per centre; `wanted` (B, K, h, w) is 1 at centres, less around them."""
    p = logits.sigmoid()
    centre = wanted == 1
    hit = -F.logsigmoid(logits) * (1 - p) ** 2
    miss = -F.logsigmoid(-logits) * p**2 * (1 - wanted) ** 4
    return torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


class JudgeRecipe:
    """Options: data (renders), val_data, soften (share of softened pictures), judge (constructor arguments)."""

    option_names = frozenset(("data", "val_data", "soften", "judge"))

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        torch.manual_seed(config.seed)
        self.judge = AttributeJudge(**options.get("judge", {}))
        self.model: nn.Module = JudgeLoss(self.judge)
        self.renders, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        self.soften: float = options.get("soften", 0.5)
        self.seed = config.seed
        # the order of the data repeats every epoch, and a scene takes longer to compose than a step may wait
        self.labels = lru_cache(maxsize=65_536)(self._labels)

    def networks(self) -> Iterable[nn.Module]:
        """See `compiled.Compilable`."""
        return [self.judge]

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        parameters = list(self.judge.parameters())
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def _labels(self, row: int) -> Labels:
        return labels_of(self.renders.scene(row), self.judge)

    def batch(self, index: int, size: int) -> Mapping[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        rows = self.renders.rows(self.seed, index * size, size)
        pictures, labels = [], []
        for row in rows:
            picture, label = self.renders.image(row), self.labels(row)
            if rng.random() < self.soften:
                picture = softened(picture, rng)
            if rng.random() < 0.5:  # the world has no handedness
                picture = picture[:, ::-1]
                places = np.concatenate([1 - label.places[:, :1], label.places[:, 1:]], axis=1)
                label = replace(label, places=places)
            pictures.append(picture)
            labels.append(label)
        return collate(np.stack(pictures), labels, self.judge)

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Scores on true renders and on softened ones."""
        rng = np.random.default_rng(0)
        rows = range(min(256, len(self.held_out)))
        truth = [attributes(self.held_out.scene(row)) for row in rows]
        pictures = np.stack([self.held_out.image(row) for row in rows])
        soft = np.stack([softened(picture, rng) for picture in pictures])
        true_scores, soft_scores = (score(self.judge.judge(p), truth) for p in (pictures, soft))
        return true_scores | {f"soft_{name}": value for name, value in soft_scores.items()}

    def save(self, folder: Path) -> None:
        self.judge.save_pretrained(folder / "judge")


def collate(pictures: Pixels, labels: Sequence[Labels], judge: AttributeJudge) -> dict[str, Tensor]:
    """Pictures (B, H, W, 3) and their labels as a batch of `JudgeLoss`."""
    cells = pictures.shape[1] // STRIDE, pictures.shape[2] // STRIDE
    kinds = len(judge.config["kinds"])
    return {
        "images": to_images(pictures).contiguous(memory_format=torch.channels_last),
        "heat": torch.from_numpy(np.stack([heat_maps(label, kinds, cells) for label in labels])),
        "items": torch.from_numpy(np.concatenate([label.items for label in labels])).long(),
        "places": torch.from_numpy(np.concatenate([label.places for label in labels])).float(),
        "picture": torch.arange(len(labels)).repeat_interleave(torch.tensor([len(label.items) for label in labels])),
        "ground": torch.tensor([label.ground for label in labels]),
        "sky": torch.tensor([label.sky for label in labels]),
    }


def heat_maps(labels: Labels, kinds: int, cells: tuple[int, int]) -> np.ndarray:
    """(K, h, w) float32: exactly 1 in the cell of each centre, a Gaussian around it."""
    heat = np.zeros((kinds, *cells), np.float32)
    rows, columns = np.mgrid[: cells[0], : cells[1]]
    for (kind, *_), (x, y, _) in zip(labels.items, labels.places, strict=True):
        row = min(max(int(y * cells[0]), 0), cells[0] - 1)
        column = min(max(int(x * cells[1]), 0), cells[1] - 1)
        bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * SPREAD**2))
        heat[kind] = np.maximum(heat[kind], bump)
    return heat


def softened(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """A picture as an imperfect decoder might give it: blurred, coarse or blocky, with a little noise."""
    draw = rng.random()
    if draw < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 1.8)).astype(np.uint8)
    elif draw < 0.75:
        side = int(picture.shape[0] * rng.uniform(0.4, 0.8))
        small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(small, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    else:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 70))]
        picture = np.asarray(cv2.imdecode(cv2.imencode(".jpg", picture, quality)[1], cv2.IMREAD_COLOR), np.uint8)
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(1, 8), picture.shape)
        picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return picture
