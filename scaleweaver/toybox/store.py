"""Pictures rendered once and streamed from disk: memory-mapped arrays beside one line of JSON a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaleweaver.toybox.dataset import ToyboxBatch, ToyboxBatches, caption_of, check_device
from scaleweaver.toybox.drawing import depth_map
from scaleweaver.toybox.scene import Scene, attributes
from scaleweaver.toybox.worlds import VERSION, world_of

MAPS = ("depth", "ids", "keypoints")
LINES, SETTINGS = "captions.jsonl", "store.json"


def cache_renders(
    path: str | os.PathLike[str],
    split: str,
    *,
    start: int = 0,
    count: int,
    size: int = 128,
    supersample: int = 2,
    captions: int = 4,
    maps: Sequence[str] = (),
    workers: int = 1,
    batch_size: int = 16,
    device: str = "cpu",
    version: int = VERSION,
    on_progress: Callable[[int, int], None] | None = None,
) -> RenderStore:
    """Render pictures [start, start + count) of a split into the folder `path`; an interrupted call goes on there.

    `captions` wordings are kept for each picture; `maps` picks some of "depth" (grey as in `drawing.depth_map`), "ids"
    and "keypoints" (of the first person, zeros where there is none). Pictures already there can be read meanwhile.
    `on_progress(done, count)` hears at the start and after every batch how many are there, nothing where all were. A
    `device` other than the CPU renders there and needs workers=0.
    """
    unknown = sorted(set(maps) - set(MAPS))
    if unknown:
        raise ValueError(f"unknown maps {unknown}, expected some of {', '.join(MAPS)}")
    check_device(device, workers)
    world_of(version)  # complains about an unknown one before anything is written
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "version": version, "split": split, "start": start, "count": count, "size": size,
        "supersample": supersample, "captions": captions, "maps": sorted(maps),
    }  # fmt: skip
    agree_on_settings(folder / SETTINGS, settings)
    arrays = {name: _array(folder, name, count, size) for name in ("images", *sorted(maps))}
    done = len(written := complete_lines(folder / LINES))
    write_atomic(folder / LINES, "".join(f"{line}\n" for line in written).encode())  # drops a half-written last line
    if done < count:
        batches = ToyboxBatches(
            split,
            batch_size,
            start=start + done,
            count=count - done,
            size=size,
            supersample=supersample,
            workers=workers,
            device=device,
            version=version,
        )
        with open(folder / LINES, "a", encoding="utf-8") as lines:
            if on_progress is not None:
                on_progress(done, count)
            for batch in batches:
                _write(batch, arrays, done, settings, lines)
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, count)
    return RenderStore(folder)


class RenderStore:
    """Reads what `cache_renders` wrote, as far as it got.

    `images` is a memory map (count, H, W, 3) uint8, and so are `depth` (count, H, W), `ids` and `keypoints`
    (count, 18, 3) float32 where they were kept; rows from len(store) on are not rendered yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / SETTINGS).is_file():
            raise ValueError(f"{self.path} holds no {SETTINGS}; make the store with cache_renders first")
        self.settings: dict[str, Any] = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        self.images: np.ndarray = np.load(self.path / "images.npy", mmap_mode="r")
        self.maps: dict[str, np.ndarray] = {
            name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in self.settings["maps"]
        }
        self._lines = complete_lines(self.path / LINES)

    def __len__(self) -> int:
        return len(self._lines)

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return np.array(self.images[row])

    def map(self, name: str, row: int) -> np.ndarray:
        """One of the maps that were kept."""
        if name not in self.maps:
            raise ValueError(f'{self.path} was rendered without "{name}"; render it with maps=("depth", "keypoints")')
        return np.array(self.maps[name][row])

    def texts(self, row: int) -> list[str]:
        """The wordings of a picture's caption."""
        return json.loads(self._lines[row])["texts"]

    def attributes(self, row: int) -> dict[str, Any]:
        """The ground truth of a picture, as `scene.attributes` gives it."""
        return json.loads(self._lines[row])["attributes"]


def stored_arrays(batch: ToyboxBatch) -> dict[str, np.ndarray]:
    """Pictures and all maps of a batch in the form that a store keeps: (B, ...) each, see `RenderStore`."""
    points = [people[0] if len(people) else np.zeros((18, 3)) for people in batch.keypoints]
    return {
        "images": batch.pixels,  # (B, H, W, 3)
        "depth": np.stack([depth_map(depth) for depth in batch.depth.numpy()]),
        "ids": batch.ids.numpy().astype(np.uint8),
        "keypoints": np.stack(points).astype(np.float32),
    }


def wordings(split: str, index: int, scene: Scene, count: int) -> list[str]:
    """The first `count` captions of a picture."""
    return [caption_of(split, index, variant=variant, scene=scene) for variant in range(count)]


def agree_on_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or compare them with those of an earlier run."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        if differing:
            changes = ", ".join(f"{name} {found.get(name)!r} -> {settings.get(name)!r}" for name in differing)
            raise ValueError(f"{path.parent} was made with other settings ({changes}); pass those or a new folder")
        return
    write_atomic(path, json.dumps(settings, indent=1).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Either the whole file is there or none of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    os.replace(partial, path)


def complete_lines(path: Path) -> list[str]:
    """Lines of a file that grows, without a half-written last one."""
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1].decode().splitlines()


def _array(folder: Path, name: str, count: int, size: int) -> np.memmap:
    path = folder / f"{name}.npy"
    shapes: dict[str, tuple[int, ...]] = {
        "images": (count, size, size, 3),
        "depth": (count, size, size),
        "ids": (count, size, size),
        "keypoints": (count, 18, 3),
    }
    if path.is_file():
        return np.load(path, mmap_mode="r+")
    dtype = np.float32 if name == "keypoints" else np.uint8
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shapes[name])


def _write(batch: ToyboxBatch, arrays: dict[str, np.memmap], row: int, settings: dict[str, Any], lines: Any) -> None:
    """Arrays first, then the lines that declare these pictures complete."""
    rows = slice(row, row + len(batch))
    kept = stored_arrays(batch)
    for name, array in arrays.items():
        array[rows] = kept[name]
        array.flush()
    for index, scene in zip(batch.indices, batch.scenes, strict=True):
        texts = wordings(settings["split"], index, scene, settings["captions"])
        record = {"index": index, "texts": texts, "attributes": attributes(scene)}
        lines.write(json.dumps(record) + "\n")
    lines.flush()
