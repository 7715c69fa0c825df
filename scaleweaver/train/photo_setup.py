"""From the options of a control run to its photos, their shapes, and the features of their captions.

Options of photos: pixels (budget of a picture, 0.06M, 0.25M, 0.60M or 1M; default: the model's), ratios (templates to
use, height / width; default: all), held_out (share of the photos kept for validation where there is no val_data;
default 0.05), latent_cache (false: encode the pictures anew for every batch), map_cache (folder of finished control
maps; default: made for every batch, with settings that vary), architecture (the published backbone that an estimate
assumes where the model is not there).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import T5EncoderModel

from scaleweaver.hub import locate
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import BUDGETS, RATIOS, ScaleSchedule, infinity_schedule, nearest_schedule
from scaleweaver.toybox.store import SETTINGS
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import CachedText, cached_text
from scaleweaver.train.photos import Photos

PHOTO_OPTIONS = frozenset(("pixels", "ratios", "held_out", "latent_cache", "map_cache", "architecture"))


def photo_folder(source: Any) -> str | None:
    """The folder of photos that data= names, None for renders."""
    if isinstance(source, Mapping) and "photos" in source:
        if set(source) != {"photos"}:
            raise ValueError(f"data is {dict(source)}; photos take a folder alone, {{photos: FOLDER}}")
        return str(source["photos"])
    if isinstance(source, str) and Path(source).exists() and not (Path(source) / SETTINGS).is_file():
        return source
    return None


def plan_of(own: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[[int, int], ScaleSchedule]:
    """How a model with this `schedule` setting draws a shape: its one size, or the nearest of the allowed templates."""
    budget, ratios = options.get("pixels"), options.get("ratios")
    if own.get("family") != "infinity":
        if budget or ratios:
            raise ValueError(
                "pixels and ratios choose among templates; this model has one size; pass --set pixels=null"
            )
        fixed = ScaleSchedule.from_dict(own)
        return lambda height, width: fixed
    budget = str(budget or own.get("budget", "1M"))
    if budget not in BUDGETS:
        raise ValueError(f"pixels is {budget!r}; expected one of {', '.join(BUDGETS)}")
    if ratios is None:
        return lambda height, width: nearest_schedule(height, width, budget)
    allowed = [str(float(ratio)) if str(float(ratio)) in RATIOS else str(ratio) for ratio in ratios]
    plans = {name: infinity_schedule(name, budget) for name in allowed}
    if not plans:
        raise ValueError(f"ratios is empty; name some of {', '.join(RATIOS)}, or leave it out for all")
    return lambda height, width: plans[min(plans, key=lambda name: abs(float(name) - height / width))]


def open_photos(
    pipe: VARControlPipeline, folder: str, options: Mapping[str, Any], config: TrainConfig, cache: Path
) -> tuple[Photos, Photos]:
    """The photos to train on and those held out, in the shapes of the model."""
    plan = plan_of(pipe.config["schedule"], options)
    maps = Path(options["map_cache"]) if options.get("map_cache") else None
    pictures = Photos.read(folder, plan, index=cache / "photos.json", least=config.batch, map_cache=maps)
    if options.get("val_data"):
        own = photo_folder(options["val_data"])
        if own is None or "held_out" in options:
            raise ValueError(f"val_data is {options['val_data']!r}; pass a folder of photos, and no held_out with it")
        held_out = Photos.read(own, plan, index=cache / "val_photos.json", map_cache=maps)
    else:
        pictures, held_out = pictures.split(options.get("held_out", 0.05))
    for schedule in (*pictures.schedules, *held_out.schedules):
        pipe._plan(schedule, None, None, None)
    return pictures, held_out


def with_records(
    wanted: Mapping[str, Mapping[str, Any]], pipe: VARControlPipeline, options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Settings of the controls with how their maps are made, so that a user's maps can be made alike."""
    square = plan_of(pipe.config["schedule"], options)(1024, 1024)
    side = round(math.sqrt(square.height * square.width))
    usual: dict[str, dict[str, Any]] = {
        "canny": {"detector": "opencv-canny", "thresholds": (100, 200)},
        "palette": {"detector": "palette-8"},
    }
    return {
        name: {**usual.get(settings["kind"], {}), "resolution": side, **settings} for name, settings in wanted.items()
    }


def encoded_texts(
    pipe: VARControlPipeline, options: Mapping[str, Any], cache: Path, several: Sequence[Photos]
) -> list[CachedText]:
    """Features of all captions; the text encoder is in memory only while something is missing."""
    folder = locate(options["model"]) / "text_encoder"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder.parent} has no text encoder, so captions cannot be read; convert it with one")
    loaded: list[T5EncoderModel] = []

    def load() -> T5EncoderModel:
        if not loaded:
            encoder = T5EncoderModel.from_pretrained(folder, dtype=pipe.transformer.dtype)
            loaded.append(encoder.eval().to(PartialState().device))
        return loaded[0]

    identity, limit = f"{_files(folder)} {pipe.transformer.dtype}", pipe.transformer.config["text_length"]
    texts = [
        cached_text(cache / name, load, pipe.tokenizer, photos, max_length=limit, identity=identity)
        for name, photos in zip(("text", "val_text"), several, strict=True)
    ]
    loaded.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return texts


def _files(folder: Path) -> str:
    """A hash that tells one encoder's files from another's without reading gigabytes: names, sizes, beginnings."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(2**20))
    return digest.hexdigest()[:16]
