"""A user's own photos as training pictures, in aspect buckets, with control maps made of them.

Every picture belongs to the size that is nearest to its shape among those the model draws, and is scaled and cut to it
evenly, its ready map likewise. A batch holds pictures of one size. Which size batch i has and which pictures it holds
depends on the seed and i alone; over N batches (N photos) every size has exactly its share.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.control_maps import detector_of
from scaleweaver.controls import KINDS
from scaleweaver.images import fit
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train.data import Pixels, encoded, fingerprint, shuffled
from scaleweaver.train.photo_files import Photo, Place, find_photos

Plan = Callable[[int, int], ScaleSchedule]  # height and width of a photo -> how the model draws that shape


class Photos:
    """Photos of a folder, see `photo_files`, as a numbered list; what `Renders` is for the built-in world.

    plan: the schedule of a shape. least: a size with fewer photos is given up, and they are cut to the nearest shape
    that remains. map_cache: folder for finished control maps, None to make them when they are read.
    """

    online = False

    def __init__(self, photos: Sequence[Photo], plan: Plan, *, least: int = 1, map_cache: Path | None = None) -> None:
        self.photos, self.plan, self.map_cache = list(photos), plan, map_cache
        chosen = [plan(photo.height, photo.width) for photo in self.photos]
        self.schedules, self.bucket = _merged(chosen, least)
        self.members = [np.flatnonzero(self.bucket == number) for number in range(len(self.schedules))]

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], plan: Plan, *, index: Path, least: int = 1, map_cache: Path | None = None
    ) -> Photos:
        """All usable photos of a folder."""
        return cls(find_photos(folder, index), plan, least=least, map_cache=map_cache)

    def split(self, share: float) -> tuple[Photos, Photos]:
        """The photos without a share of them, at least one, and that share, chosen by the names alone."""
        if len(self) < 2 or not 0 < share < 1:
            raise ValueError(f"{len(self)} photos cannot be split by held_out={share}; pass val_data, or more photos")
        order = sorted(range(len(self)), key=lambda row: _digest(self.photos[row].place.name))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        # a shape that was given up stays so, whatever a part holds of it
        ways = {(p.height, p.width): self.schedule(row) for row, p in enumerate(self.photos)}

        def part(rows: Sequence[int]) -> Photos:
            some = [self.photos[row] for row in sorted(rows)]
            return Photos(some, lambda height, width: ways[height, width], map_cache=self.map_cache)

        return part(order[count:]), part(order[:count])

    def __len__(self) -> int:
        return len(self.photos)

    def rows(self, seed: int, start: int, size: int) -> list[int]:
        """Batch `start / size` of an endless list of batches, all of one shape."""
        owner, earlier = self._order(seed)
        period, place = divmod(start // size, len(owner))
        bucket = int(owner[place])
        members = self.members[bucket]
        batch = period * len(members) + int(earlier[place])  # of this bucket
        picks = shuffled(len(members), seed * 1_000_003 + bucket, batch * size, size)
        return [int(members[pick]) for pick in picks]

    def _order(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bucket of each batch of a period, and how many batches of that bucket come before it in the period."""
        return _spread(tuple(len(members) for members in self.members), seed)

    def schedule(self, row: int) -> ScaleSchedule:
        return self.schedules[self.bucket[row]]

    def image(self, row: int) -> Pixels:
        """(H, W, 3) as the model is to draw it."""
        plan, place = self.schedule(row), self.photos[row].place
        return np.asarray(fit(place.picture(), plan.height, plan.width, two_level=False, name=place.name))

    def captions(self, row: int) -> list[str]:
        return list(self.photos[row].captions)

    def exact_map(self, name: str, config: ScaleWeaverConfig, row: int) -> Pixels:
        """The control image (H, W, 3): the ready one, or as the control's record says."""
        ready = self._ready(name, row)
        return self._made(config, row) if ready is None else ready

    def varied_map(self, name: str, config: ScaleWeaverConfig, row: int, rng: np.random.Generator) -> Pixels:
        """The same with other settings of a cheap detector; ready and cached maps are what they are."""
        ready = self._ready(name, row)
        if ready is not None:
            return ready
        changes = {} if self.map_cache else varied_settings(config, rng)
        if not changes:
            return self._made(config, row)
        return np.asarray(replace(_detector(config), **changes)(self.image(row)))

    def check_maps(self, wanted: Mapping[str, ScaleWeaverConfig]) -> None:
        """Refuses a control whose maps nobody can make or tell apart, before anything is trained."""
        nameless = [photo.maps[""].name for photo in self.photos if "" in photo.maps]
        if nameless and len(wanted) > 1:
            raise ValueError(
                f"ready maps such as {nameless[0]} do not say for which of the controls {', '.join(wanted)} they are; "
                f"call them conditioning_image_{next(iter(wanted))} and so on"
            )
        for name, config in wanted.items():
            lacking = [photo.place.name for photo in self.photos if self._place(name, photo) is None]
            if lacking and config.kind not in KINDS:
                raise ValueError(
                    f'control "{name}" is of kind {config.kind!r}, which no preprocessor makes, and {len(lacking)} '
                    f"pictures have no ready map ({lacking[0]}); add conditioning_image files, see photo_files.py"
                )
            if lacking:
                detector_of(config)

    def _place(self, name: str, photo: Photo) -> Place | None:
        return photo.maps.get(name) or photo.maps.get("")

    def _ready(self, name: str, row: int) -> Pixels | None:
        photo, plan = self.photos[row], self.schedule(row)
        place = self._place(name, photo)
        if place is None:
            return None
        found = place.picture()
        if abs(math.log(found.width / found.height * photo.height / photo.width)) > 0.02:
            raise ValueError(
                f"map {place.name} is {found.width}x{found.height}, its picture {photo.width}x{photo.height}; both "
                "must have one shape, since they are cut alike"
            )
        return np.asarray(fit(found, plan.height, plan.width, name=place.name))

    def _made(self, config: ScaleWeaverConfig, row: int) -> Pixels:
        if self.map_cache is None:
            return np.asarray(_detector(config)(self.image(row)))
        photo, plan, detect = self.photos[row], self.schedule(row), _detector(config)
        status = photo.place.file.stat()
        what = (photo.place.name, status.st_size, status.st_mtime_ns, plan.height, plan.width, str(detect))
        file = self.map_cache / config.kind / f"{_digest(what)}.png"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            detect(self.image(row)).save(partial, format="PNG")
            os.replace(partial, file)
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGB"))


def varied_settings(config: ScaleWeaverConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Settings of a preprocessor drawn around the recorded ones, so that an adapter is not tied to one value."""
    if config.kind == "canny":
        low, high = rng.uniform(50, 120), rng.uniform(100, 240)
        return {"low": min(low, high), "high": max(low, high)}
    if config.kind == "palette":
        return {"cells": int(rng.choice((4, 8, 8, 16)))}
    if config.kind == "blur":
        return {"radius": float(rng.uniform(0.004, 0.04))}
    return {}


def photo_latents(
    folder: Path, vae: BSQTokenizer, photos: Photos, *, cached: bool, batch: int = 8
) -> Callable[[Sequence[int]], NDArray[np.float16]]:
    """Rows of one shape -> latents (B, d, Hl, Wl), encoded when read, or once and kept in a file for each shape."""
    if not cached:
        return lambda rows: encoded(vae, photos, rows)
    kept: list[NDArray[np.float16]] = []
    place = np.zeros(len(photos), np.int64)
    for plan, members in zip(photos.schedules, photos.members, strict=True):
        place[members] = np.arange(len(members))
        kept.append(_kept_latents(folder, vae, photos, plan, members.tolist(), batch))
    return lambda rows: np.stack([kept[photos.bucket[row]][place[row]] for row in rows])


def _kept_latents(
    folder: Path, vae: BSQTokenizer, photos: Photos, plan: ScaleSchedule, rows: Sequence[int], batch: int
) -> NDArray[np.float16]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [photos.photos[row].place for row in rows]
    stamps = [(p.name, p.offset, p.file.stat().st_size, p.file.stat().st_mtime_ns) for p in files]
    mark = {"photos": _digest(stamps), "fingerprint": fingerprint(vae)}
    path = folder / f"{plan.height}x{plan.width}.npy"
    done = path.with_suffix(".json")
    if not (done.is_file() and json.loads(done.read_text()) == mark):
        done.unlink(missing_ok=True)
        stride = vae.config["stride"]
        shape = (len(rows), vae.config["bits"], plan.height // stride, plan.width // stride)
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, len(rows), batch):
            out[start : start + batch] = encoded(vae, photos, rows[start : start + batch])
        out.flush()
        done.write_text(json.dumps(mark))
    return np.load(path, mmap_mode="r")


def _merged(chosen: Sequence[ScaleSchedule], least: int) -> tuple[list[ScaleSchedule], NDArray[np.int64]]:
    """The sizes in use and which of them each photo has, once sizes with too few photos were given up."""
    # the most square first, so that the order does not depend on the photos
    sizes = sorted({(s.height, s.width): s for s in chosen}.values(), key=lambda s: (abs(_log_ratio(s)), s.height))
    nearest = {(s.height, s.width): s for s in sizes}
    while True:
        counts = {(s.height, s.width): 0 for s in sizes}
        for one in chosen:
            way = nearest[one.height, one.width]
            counts[way.height, way.width] += 1
        poor = min(sizes, key=lambda s: (counts[s.height, s.width], -abs(_log_ratio(s))))
        if counts[poor.height, poor.width] >= least or len(sizes) == 1:
            break
        sizes.remove(poor)
        for key, way in nearest.items():
            if way is poor:
                nearest[key] = min(sizes, key=lambda s: abs(_log_ratio(s) - math.log(key[0] / key[1])))
    place = {(s.height, s.width): number for number, s in enumerate(sizes)}
    ways = [nearest[one.height, one.width] for one in chosen]
    return sizes, np.array([place[way.height, way.width] for way in ways], np.int64)


def _log_ratio(plan: ScaleSchedule) -> float:
    return math.log(plan.height / plan.width)


@lru_cache(maxsize=4)
def _spread(counts: tuple[int, ...], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Owners of sum(counts) places, counts[b] of them b's and evenly spread, and each place's number among its own."""
    rng = np.random.default_rng((seed, len(counts)))
    times = np.concatenate([(np.arange(count) + rng.random()) / count for count in counts])
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(times, kind="stable")
    return owner[order], number[order]


@lru_cache(maxsize=16)
def _detector(config: ScaleWeaverConfig) -> Any:
    """One object a control, which keeps its network."""
    return detector_of(config)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
