"""The toy world as training data, rendered while it is read; every sample is a pure function of its index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scaleweaver.toybox.captions import caption
from scaleweaver.toybox.render import render
from scaleweaver.toybox.scene import VERSION, Scene, generator, sample_scene

ENDLESS = 2**40  # an index no training run reaches


@dataclass(frozen=True)
class ToyboxSample:
    """One picture with its caption and everything that is known about it."""

    index: int
    scene: Scene
    text: str
    image: Tensor  # (3, H, W) in [0, 1]
    depth: Tensor  # (H, W) metres, inf for the sky
    ids: Tensor  # (H, W) int16, i + 1 for item i of the scene
    keypoints: np.ndarray  # (people, 18, 3): x, y in pixels, 0 outside | 1 hidden | 2 visible


@dataclass(frozen=True)
class ToyboxBatch:
    """Several samples, rendered together."""

    indices: list[int]
    scenes: list[Scene]
    texts: list[str]
    images: Tensor  # (B, 3, H, W) in [0, 1]
    depth: Tensor  # (B, H, W)
    ids: Tensor  # (B, H, W)
    keypoints: list[np.ndarray]  # B of (people, 18, 3)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def pixels(self) -> np.ndarray:
        """The pictures as (B, H, W, 3) uint8."""
        return self.images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()

    def __getitem__(self, i: int) -> ToyboxSample:
        scene, text, keypoints = self.scenes[i], self.texts[i], self.keypoints[i]
        return ToyboxSample(self.indices[i], scene, text, self.images[i], self.depth[i], self.ids[i], keypoints)


def caption_of(split: str, index: int, *, variant: int = 0, scene: Scene | None = None, version: int = VERSION) -> str:
    """Caption number `variant` of a picture; `scene` saves sampling it again and says its version itself."""
    scene = scene or sample_scene(split, index, version=version)
    return caption(scene, generator(split, index, version=scene.version, stream=1 + variant))


def draw_batch(
    split: str,
    indices: Iterable[int],
    *,
    size: int = 128,
    supersample: int = 2,
    variant: int = 0,
    device: str = "cpu",
    version: int = VERSION,
) -> ToyboxBatch:
    """Sample, caption and render the pictures of some indices, on `device`; what comes back lies on the CPU."""
    numbers = list(indices)
    scenes = [sample_scene(split, index, version=version) for index in numbers]
    texts = [
        caption_of(split, index, variant=variant, scene=scene) for index, scene in zip(numbers, scenes, strict=True)
    ]
    frames = render(scenes, size=size, supersample=supersample, device=device)
    # the renderer works in inference mode, whose tensors autograd refuses; copies made here are ordinary ones
    image, depth, ids = (tensor.to("cpu", copy=True) for tensor in (frames.image, frames.depth, frames.ids))
    return ToyboxBatch(numbers, scenes, texts, image, depth, ids, frames.keypoints)


def check_device(device: str, workers: int) -> None:
    """Refuses a device that is not there, and one other than the CPU together with background processes."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device is {device!r}, which torch does not know; pass cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no GPU here; pass device='cpu'")
    if kind != "cpu" and workers:
        raise ValueError(f"device {device!r} with {workers} background processes, which cannot use it; pass workers=0")


class ToyboxDataset(Dataset[ToyboxSample]):
    """Pictures [start, start + count) of a split, one at a time; `ToyboxBatches` renders faster.

    A `device` other than the CPU renders there, which a `DataLoader` with background processes cannot do.
    """

    def __init__(
        self,
        split: str,
        count: int,
        *,
        start: int = 0,
        size: int = 128,
        supersample: int = 2,
        variant: int = 0,
        device: str = "cpu",
        version: int = VERSION,
    ) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; a dataset needs at least one picture")
        check_device(device, workers=0)
        generator(split, start, version=version)  # complains about an unknown split now, not in a worker
        self.split, self.count, self.start = split, count, start
        self.size, self.supersample, self.variant, self.version = size, supersample, variant, version
        self.device = device

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> ToyboxSample:
        return self.batch([i])[0]

    def batch(self, positions: Iterable[int]) -> ToyboxBatch:
        """Several positions of the dataset, rendered together."""
        numbers = list(positions)
        for i in numbers:
            if not 0 <= i < self.count:
                raise IndexError(f"position {i} of a dataset of {self.count} pictures")
        return draw_batch(
            self.split,
            [self.start + i for i in numbers],
            size=self.size,
            supersample=self.supersample,
            variant=self.variant,
            device=self.device,
            version=self.version,
        )


class _Chunks(Dataset[ToyboxBatch]):
    """Batch b holds positions [b * batch_size, (b + 1) * batch_size) of the pictures from `first` on."""

    def __init__(self, pictures: ToyboxDataset, first: int, batch_size: int) -> None:
        self.pictures, self.first, self.batch_size = pictures, first, batch_size

    def __getitem__(self, b: int) -> ToyboxBatch:
        start = self.first + b * self.batch_size
        return self.pictures.batch(range(start, min(start + self.batch_size, len(self.pictures))))


class ToyboxBatches:
    """Batches in order of index, rendered by `workers` background processes (0: in this one).

    Without `count` the stream does not end. An interrupted run goes on at the same picture: `state_dict()` names the
    next index, `load_state_dict` or `start` takes it; every `iter()` begins there, and at the first picture again once
    all were read. A `device` other than the CPU renders there and needs workers=0.
    """

    def __init__(
        self,
        split: str,
        batch_size: int = 16,
        *,
        start: int = 0,
        count: int | None = None,
        size: int = 128,
        supersample: int = 2,
        workers: int = 1,
        variant: int = 0,
        device: str = "cpu",
        version: int = VERSION,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        check_device(device, workers)
        self.pictures = ToyboxDataset(
            split,
            count or ENDLESS,
            start=start,
            size=size,
            supersample=supersample,
            variant=variant,
            device=device,
            version=version,
        )
        self.batch_size, self.workers = batch_size, workers
        self.position = 0  # pictures handed out so far

    def state_dict(self) -> dict[str, int]:
        return {"next_index": self.pictures.start + self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        position = state["next_index"] - self.pictures.start
        if not 0 <= position <= len(self.pictures):
            raise ValueError(f"next_index {state['next_index']} lies outside of these pictures")
        self.position = position

    def __iter__(self) -> Iterator[ToyboxBatch]:
        left = len(self.pictures) - self.position
        loader: DataLoader[ToyboxBatch] = DataLoader(
            _Chunks(self.pictures, self.position, self.batch_size),
            batch_size=None,  # a batch is one item of the chunks
            sampler=range(-(-left // self.batch_size)),
            num_workers=self.workers,
            collate_fn=_unchanged,
        )
        for batch in loader:
            # counted before the batch is handed out: whoever saves the state has seen this batch
            self.position += len(batch)
            yield batch
        self.position = 0


def _unchanged(batch: Any) -> Any:
    return batch
