"""Renders that are drawn while they are read: the interface of a render store without its folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from scaleweaver.toybox.dataset import ToyboxDataset
from scaleweaver.toybox.scene import VERSION, Scene, sample_scene
from scaleweaver.toybox.store import stored_arrays, wordings

BLOCK = 16  # pictures rendered together
KEPT = 16  # blocks in memory: a batch of 200 pictures may be read several times


class OnlineRenders:
    """Pictures [start, start + count) of a split, rendered on demand in blocks of `BLOCK`; all maps are there.

    A row is a pure function of its number. Reading neighbours after each other costs one rendering each, reading rows
    at random one block each.
    """

    def __init__(
        self,
        split: str,
        *,
        count: int,
        start: int = 0,
        size: int = 128,
        supersample: int = 2,
        captions: int = 4,
        device: str = "cpu",
        version: int = VERSION,
    ) -> None:
        if captions < 1:
            raise ValueError(f"captions is {captions}; expected at least 1 wording a picture")
        self.pictures = ToyboxDataset(
            split, count, start=start, size=size, supersample=supersample, device=device, version=version
        )
        self.settings = {"version": version, "split": split, "start": start}
        self.captions = captions
        self.path = Path(f"online-{split}-{start}-{count}")  # names these pictures, no folder
        self._block = lru_cache(maxsize=KEPT)(self._render)
        self._scene = lru_cache(maxsize=KEPT * BLOCK)(self._sample)

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.map("images", row)

    def map(self, name: str, row: int) -> np.ndarray:
        """One of "depth", "ids" and "keypoints", as `RenderStore` keeps it."""
        return np.array(self._block(row // BLOCK)[name][row % BLOCK])

    def texts(self, row: int) -> list[str]:
        """The wordings of a picture's caption; needs no rendering."""
        split, index = self.pictures.split, self.pictures.start + row
        return wordings(split, index, self._scene(row), self.captions)

    def _render(self, block: int) -> dict[str, np.ndarray]:
        rows = range(block * BLOCK, min((block + 1) * BLOCK, len(self)))
        return stored_arrays(self.pictures.batch(rows))

    def _sample(self, row: int) -> Scene:
        return sample_scene(self.pictures.split, self.pictures.start + row, version=self.pictures.version)
