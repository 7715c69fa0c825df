"""The toy world as files for other tools: an image folder with every kind of ground truth, or webdataset shards.

The folder follows the imagefolder convention: metadata.jsonl, one line a picture with file_name and text.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaleweaver.toybox.dataset import ToyboxBatches, ToyboxSample, check_device
from scaleweaver.toybox.drawing import depth_map, depth_range, draw_skeleton, ids_map
from scaleweaver.toybox.scene import attributes
from scaleweaver.toybox.store import agree_on_settings, complete_lines, write_atomic
from scaleweaver.toybox.worlds import VERSION, world_of

# folder of each file of a sample, and its name's ending; the name before it is the picture's index
PLACES = {
    "image": ("images", ".png"),
    "depth": ("depth", ".png"),  # 16 bits, near is bright
    "ids": ("ids", ".png"),
    "keypoints": ("keypoints", ".json"),
    "depth_drawing": ("drawings/depth", ".png"),
    "pose_drawing": ("drawings/pose", ".png"),
}
SETTINGS, LINES = "toybox.json", "metadata.jsonl"


def write_folder(
    out: str | os.PathLike[str],
    split: str,
    count: int,
    *,
    start: int = 0,
    size: int = 128,
    supersample: int = 2,
    variant: int = 0,
    shards: bool = False,
    pictures_per_shard: int = 1000,
    workers: int = 0,
    batch_size: int = 16,
    device: str = "cpu",
    version: int = VERSION,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write pictures [start, start + count) of a split into the folder `out`; returns how many were rendered now.

    What is complete already is skipped, so an interrupted call goes on where it stopped and a larger `count` extends
    the folder. With `shards` the samples go into out/<split>-<first index>.tar instead, `pictures_per_shard` each.
    `on_progress(done, count)` hears at the start and after every picture how many are there; a `device` other than
    the CPU renders there and needs workers=0.
    """
    if count < 1 or pictures_per_shard < 1:
        raise ValueError(f"count {count} and pictures_per_shard {pictures_per_shard} must be at least 1")
    check_device(device, workers)
    world_of(version)  # complains about an unknown one before anything is written
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"version": version, "split": split, "start": start, "size": size, "supersample": supersample}
    settings |= {"variant": variant, "pictures_per_shard": pictures_per_shard if shards else 0}
    agree_on_settings(folder / SETTINGS, settings)

    def render(first: int, number: int) -> Iterator[ToyboxSample]:
        batches = ToyboxBatches(
            split,
            min(batch_size, number),
            start=first,
            count=number,
            size=size,
            supersample=supersample,
            workers=workers,
            variant=variant,
            device=device,
            version=version,
        )
        for batch in batches:
            yield from (batch[i] for i in range(len(batch)))

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress(done, count)

    if not shards:
        return _write_files(folder, start, count, render, report)
    rendered = 0
    for first in range(start, start + count, pictures_per_shard):
        number = min(pictures_per_shard, start + count - first)
        path = folder / f"{split}-{first:08d}.tar"
        rendered += _write_shard(path, first - start, number, render(first, number), report)
    return rendered


def sample_files(sample: ToyboxSample) -> dict[str, bytes]:
    """The files of a sample, keyed as in PLACES."""
    depth, keypoints = sample.depth.numpy(), sample.keypoints
    pixels = sample.image.mul(255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
    return {
        "image": _png(Image.fromarray(pixels)),
        "depth": _png(Image.fromarray(depth_map(depth, levels=65535))),
        "ids": _png(ids_map(sample.ids.numpy())),
        "keypoints": json.dumps(openpose_json(keypoints, pixels.shape[0], pixels.shape[1])).encode(),
        "depth_drawing": _png(Image.fromarray(depth_map(depth))),
        "pose_drawing": _png(Image.fromarray(draw_skeleton(keypoints, pixels.shape[:2]))),
    }


def sample_record(sample: ToyboxSample) -> dict[str, Any]:
    """What the metadata tells about a sample, apart from its files."""
    near, far = depth_range(sample.depth.numpy())
    return {
        "text": sample.text,
        "index": sample.index,
        "depth_near": near,  # metres at the brightest and at the darkest level of the depth map
        "depth_far": far,
        **attributes(sample.scene),
    }


def openpose_json(keypoints: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Key points (people, 18, 3) in OpenPose's JSON; joints that are not in the picture are zeros as there."""
    people = []
    for person in keypoints.reshape(-1, 18, 3):
        rows = np.where(person[:, 2:] > 0, person, 0.0)
        rows[:, 2] = rows[:, 2].clip(0, 1)
        people.append({"pose_keypoints_2d": [round(float(value), 2) for value in rows.reshape(-1)]})
    return {"version": 1.3, "canvas_height": height, "canvas_width": width, "people": people}


def _write_files(folder: Path, start: int, count: int, render: Any, report: Callable[[int], None]) -> int:
    """Files first, then the line that declares the picture complete."""
    for place, _ in PLACES.values():
        (folder / place).mkdir(parents=True, exist_ok=True)
    records: dict[int, str] = {}
    for line in complete_lines(folder / LINES):
        index = json.loads(line)["index"]
        if all(_path(folder, key, index).is_file() for key in PLACES):
            records[index] = line
    rendered = 0
    _write_lines(folder, records)
    there = sum(start <= index < start + count for index in records)
    report(there)
    with open(folder / LINES, "a", encoding="utf-8") as lines:
        for first, number in _gaps(start, count, set(records)):
            for sample in render(first, number):
                for key, data in sample_files(sample).items():
                    write_atomic(_path(folder, key, sample.index), data)
                names = {key: _path(Path(), key, sample.index).as_posix() for key in PLACES}
                record = {"file_name": names.pop("image"), **sample_record(sample)}
                # columns that end in file_name and hold pictures are read as pictures
                record |= {f"{key}_file_name" if name.endswith(".png") else key: name for key, name in names.items()}
                records[sample.index] = json.dumps(record)
                lines.write(records[sample.index] + "\n")
                lines.flush()
                rendered += 1
                report(there + rendered)
    _write_lines(folder, records)
    return rendered


def _write_lines(folder: Path, records: dict[int, str]) -> None:
    write_atomic(folder / LINES, "".join(f"{records[index]}\n" for index in sorted(records)).encode())


def _gaps(start: int, count: int, done: set[int]) -> Iterator[tuple[int, int]]:
    """(first, number) of each run of missing indices."""
    first = start
    for index in range(start, start + count + 1):
        if index in done or index == start + count:
            if index > first:
                yield first, index - first
            first = index + 1


def _write_shard(
    path: Path, before: int, number: int, samples: Iterator[ToyboxSample], report: Callable[[int], None]
) -> int:
    """One tar file, there when it is complete; returns how many pictures were rendered for it."""
    if path.is_file():
        with tarfile.open(path) as tar:
            if sum(name.endswith(".txt") for name in tar.getnames()) == number:
                report(before + number)
                return 0
    partial = path.with_name(path.name + ".part")
    with tarfile.open(partial, "w") as tar:
        for written, sample in enumerate(samples):
            report(before + written)
            files = sample_files(sample)
            files |= {"text": sample.text.encode(), "record": json.dumps(sample_record(sample)).encode()}
            for key, data in files.items():
                # webdataset groups the files of a sample by what stands before the first dot
                entry = tarfile.TarInfo(f"{sample.index:08d}{_SHARD_ENDINGS[key]}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    os.replace(partial, path)
    report(before + number)
    return number


_SHARD_ENDINGS = {
    "image": ".png",
    "text": ".txt",
    "record": ".json",
    "depth": ".depth.png",
    "ids": ".ids.png",
    "keypoints": ".keypoints.json",
    "depth_drawing": ".depth_drawing.png",
    "pose_drawing": ".pose_drawing.png",
}


def _path(folder: Path, key: str, index: int) -> Path:
    place, ending = PLACES[key]
    return folder / place / f"{index:08d}{ending}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
