"""Recipe "estimator": the depth and key-point network for pictures of the built-in world.

It trains on renders that no generator was trained on, half of them softened as a tokenizer softens pictures, so that it
can measure what a generator made of a depth map or a pose. Joints are located by the divergence of their heat map from
a Gaussian around the true place, depth by its L1 distance and that of its slopes, as each map is normalised already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from scaleweaver.controls.estimator import JOINTS, STRIDE, ToyboxEstimator
from scaleweaver.evaluate.depth import depth_errors
from scaleweaver.evaluate.pose import pose_scores
from scaleweaver.toybox.drawing import COCO_18, draw_skeleton
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Pixels, Renders, save_grid, shuffled, to_images
from scaleweaver.train.judge import softened

SPREAD = 0.7  # standard deviation of the Gaussian around a joint, in cells
HIDDEN = 0.5  # weight of a joint that something covers
WEIGHTS = {"depth": 10.0, "slope": 10.0, "sky": 1.0, "joints": 1.0, "person": 0.5}
SHOWN = 24  # pictures on the sheet
_OTHER_SIDE = {"right": "left", "left": "right"}
# the place of each joint's partner on the other side, the middle ones being their own
MIRRORED = [COCO_18.index(" ".join(_OTHER_SIDE.get(word, word) for word in name.split())) for name in COCO_18]


@dataclass(frozen=True)
class Example:
    """A picture and what the network should say of it."""

    picture: Pixels  # (H, W, 3)
    depth: Pixels  # (H, W) grey as `toybox.drawing.depth_map` makes it
    points: NDArray[np.float32]  # (18, 3): x and y in pixels, 0 outside | 1 hidden | 2 visible; zeros are nobody

    def flipped(self) -> Example:
        """Left and right exchanged, also those of the joints' names."""
        points = self.points[MIRRORED]
        points[:, 0] = np.where(points[:, 2] > 0, self.picture.shape[1] - points[:, 0], 0)
        return Example(self.picture[:, ::-1], self.depth[:, ::-1], points)


class EstimatorLoss(nn.Module):
    """Weighted sum of all losses; forward({"images", "depth", "joints", "weight", "person"}, seed), see `collate`."""

    def __init__(self, estimator: ToyboxEstimator):
        super().__init__()
        self.estimator = estimator

    def forward(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        out = {name: value.float() for name, value in self.estimator(batch["images"]).items()}
        solid = batch["depth"] > 0  # (B, H, W)
        error = out["depth"] - (batch["depth"] - 1) / 254
        logs = out["joints"].flatten(2).log_softmax(dim=2)  # (B, 18, cells)
        divergence = F.kl_div(logs, batch["joints"].flatten(2), reduction="none").sum(2)  # (B, 18)
        losses = {
            "depth": mean_where(error.abs(), solid),
            "slope": slope(error, solid),
            "sky": F.binary_cross_entropy_with_logits(out["sky"], (~solid).float()),
            # a sum over known joints: a batch without people must not divide by zero
            "joints": (divergence * batch["weight"]).sum() / batch["weight"].sum().clamp(min=1),
            "person": F.binary_cross_entropy_with_logits(out["person"], batch["person"]),
        }
        loss = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        return loss, {name: value.detach() for name, value in losses.items()}


def slope(error: Tensor, solid: Tensor) -> Tensor:
    """L1 distance of the slopes of two depth maps, from their difference (B, H, W), where both pixels are solid."""
    across = mean_where((error[:, :, 1:] - error[:, :, :-1]).abs(), solid[:, :, 1:] & solid[:, :, :-1])
    down = mean_where((error[:, 1:] - error[:, :-1]).abs(), solid[:, 1:] & solid[:, :-1])
    return across + down


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class EstimatorRecipe:
    """Options: data (renders with depth and key points), val_data, soften (share of softened pictures), estimator
    (constructor arguments).
    """

    option_names = frozenset(("data", "val_data", "soften", "estimator"))

    def __init__(self, config: TrainConfig):
        options = config.options.among(self.option_names)
        torch.manual_seed(config.seed)
        self.estimator = ToyboxEstimator(**options.get("estimator", {})).to(memory_format=torch.channels_last)
        self.model: nn.Module = EstimatorLoss(self.estimator)
        self.renders, self.held_out = Renders(options["data"]), Renders(options["val_data"])
        for name, renders in (("data", self.renders), ("val_data", self.held_out)):
            if renders.online:
                raise ValueError(f"{name} is online, but people are sought in all pictures first; give path to a store")
            if (side := renders.image(0).shape[0]) != self.estimator.config["size"]:
                raise ValueError(f"{name} is {side} pixels wide; pass --set estimator.size={side} or render again")
        self.soften: float = options.get("soften", 0.5)
        self.seed = config.seed
        everything = range(len(self.renders))
        # joints are harder than depth and two pictures in three show nobody: those with people come twice
        self.order = [*everything, *(row for row in everything if self.renders.keypoints(row) is not None)]

    def networks(self) -> Iterable[nn.Module]:
        """See `compiled.Compilable`."""
        return [self.estimator]

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        parameters = list(self.estimator.parameters())
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def batch(self, index: int, size: int) -> Mapping[str, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        examples = []
        for place in shuffled(len(self.order), self.seed, index * size, size):
            example = example_of(self.renders, self.order[place])
            picture = recolored(example.picture, rng)
            if rng.random() < self.soften:
                picture = softened(picture, rng)
            example = replace(example, picture=picture)
            examples.append(example.flipped() if rng.random() < 0.5 else example)
        return collate(examples)

    def validate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Scores on true renders and on softened ones; a sheet of picture, true depth, found depth and skeleton."""
        rng = np.random.default_rng(0)
        truth = [example_of(self.held_out, row) for row in range(min(256, len(self.held_out)))]
        pictures = np.stack([example.picture for example in truth])
        soft = np.stack([softened(picture, rng) for picture in pictures])
        save_grid(folder / f"{step:06d}.png", sheet(self.estimator, truth[:SHOWN]), columns=8)
        soft_scores = scores(self.estimator, soft, truth)
        return scores(self.estimator, pictures, truth) | {f"soft_{name}": value for name, value in soft_scores.items()}

    def save(self, folder: Path) -> None:
        """In bf16: half the size."""
        kept = ToyboxEstimator.from_config(self.estimator.config)
        kept.load_state_dict(self.estimator.state_dict())
        kept.bfloat16().save_pretrained(folder / "estimator")


def example_of(renders: Renders, row: int) -> Example:
    """A render with its exact depth and key points."""
    points = renders.keypoints(row)
    depth = renders.depth(row)[..., 0]
    return Example(renders.image(row), depth, np.zeros((JOINTS, 3), np.float32) if points is None else points)


def recolored(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast and tint a little off, as generated colours are."""
    gain = rng.uniform(0.9, 1.1) * rng.uniform(0.95, 1.05, 3)
    return np.clip(128 + (picture - 128.0) * gain + rng.uniform(-12, 12), 0, 255).astype(np.uint8)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples as a batch of `EstimatorLoss`: "joints" (B, 18, h, w) sum to 1 over the cells, "weight" (B, 18)."""
    points = np.stack([example.points for example in examples])  # (B, 18, 3)
    height, width = examples[0].depth.shape
    weight = np.choose(points[..., 2].astype(int), (0.0, HIDDEN, 1.0)).astype(np.float32)
    return {
        "images": to_images(np.stack([e.picture for e in examples])).contiguous(memory_format=torch.channels_last),
        "depth": torch.from_numpy(np.stack([example.depth for example in examples])).float(),
        "joints": torch.from_numpy(heat_maps(points, (height // STRIDE, width // STRIDE))),
        "weight": torch.from_numpy(weight),
        "person": torch.from_numpy(points.any((1, 2)).astype(np.float32)),
    }


def heat_maps(points: NDArray[np.float32], cells: tuple[int, int]) -> NDArray[np.float32]:
    """Joints (B, 18, 3) in pixels -> probabilities (B, 18, h, w): a Gaussian around each."""
    rows, columns = (np.arange(count) + 0.5 for count in cells)
    across = np.exp(-((columns - points[..., :1] / STRIDE) ** 2) / (2 * SPREAD**2))  # (B, 18, w)
    down = np.exp(-((rows - points[..., 1:2] / STRIDE) ** 2) / (2 * SPREAD**2))  # (B, 18, h)
    heat = down[..., None] * across[..., None, :]  # (B, 18, h, w)
    return (heat / heat.sum((2, 3), keepdims=True)).astype(np.float32)


def scores(estimator: ToyboxEstimator, pictures: Pixels, truth: Sequence[Example]) -> dict[str, float]:
    """How well the network reads pictures (B, H, W, 3) of these scenes.

    "depth_rmse": of inverse depth from 0 to 1 after the best scale and shift of each picture. "sky": share of pixels
    rightly told sky or not. "pck": share of a person's joints found within a tenth of the height of the person's box,
    nan without people. "presence": share of pictures rightly told to show somebody or nobody.
    """
    rows = list(zip(estimator.depths(pictures), estimator.poses(pictures), truth, strict=True))
    joints = [pose_scores(points, example.points[None])["pck"] for _, points, example in rows]
    known = [share for share in joints if share is not None]
    return {
        "depth_rmse": float(np.mean([depth_errors(depth, example.depth)["rmse_unit"] for depth, _, example in rows])),
        "sky": float(np.mean([(depth == 0) == (example.depth == 0) for depth, _, example in rows])),
        "pck": float(np.mean(known)) if known else math.nan,
        "presence": float(np.mean([(len(points) > 0) == example.points.any() for _, points, example in rows])),
    }


def sheet(estimator: ToyboxEstimator, examples: Sequence[Example]) -> Pixels:
    """Over each other: the picture, its true depth, the depth found, the skeleton found over a dim picture."""
    pictures = np.stack([example.picture for example in examples])
    wanted = np.stack([example.depth for example in examples])[..., None].repeat(3, axis=3)
    found = (255 * estimator.depths(pictures)).round().astype(np.uint8)[..., None].repeat(3, axis=3)
    drawn = [draw_skeleton(people, pictures.shape[1]) for people in estimator.poses(pictures)]
    over = np.maximum(pictures // 3, np.stack(drawn))
    return np.concatenate([pictures, wanted, found, over], axis=1)  # (B, 4 H, W, 3)
