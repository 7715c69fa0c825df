"""Short trainings of tokenizer and backbone with one thing changed each, for limits.py.

All start from fresh weights with the same steps and pictures. So short a run ranks how fast something is learned at
first and nothing more. The baselines differ by their seed alone: a difference within theirs says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scaleweaver import VARControlPipeline
from scaleweaver.cache import KVCache
from scaleweaver.hub import built_in_folder
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.train import read_config
from scaleweaver.train.backbone import BackboneRecipe
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.data import Renders, to_images
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.tokenizer import TokenizerRecipe, reconstruct
from scaleweaver.train.trainer import train

if TYPE_CHECKING:
    from limits import Study

RECIPES = Path(__file__).parents[1] / "recipes" / "toybox"
BATCH = 16
FLIPPED = 0.2  # on the damaged history each scale has up to this share of flipped bits, as in the recipe's training
SHORT = {
    "tokenizer": {"steps": 20, "warmup": 5, "ema": 0.9},
    "backbone": {"steps": 40, "warmup": 8, "ema": 0.9},
}
ALL = {"log_every": 10, "validate_every": 100_000, "checkpoint_every": 20, "keep_checkpoints": 1}

# name -> what differs from recipes/toybox/backbone.yaml; the two other shapes cost as many operations as the recipe's
BACKBONES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "baseline, seed 1": {"seed": 1},
    "muon": {"optimizer": "muon"},
    "learning rate x 2": {"lr": 2.4e-3},
    "learning rate / 2": {"lr": 6e-4},
    "no self-correction": {"strength": 0.0},
    "width 384, depth 3": {"transformer.width": 384, "transformer.heads": 6, "transformer.depth": 3},
    "width 192, depth 12": {"transformer.width": 192, "transformer.heads": 3, "transformer.depth": 12},
    "self-correction 0.3": {"strength": 0.3},
    "captions never left out": {"text_dropout": 0.0, "empty_prompts": 0.0},
    "captions left out 0.3": {"text_dropout": 0.3},
}
# name -> what differs from recipes/toybox/tokenizer.yaml
TOKENIZERS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "16 bits": {"vae.bits": 16},
    "48 bits": {"vae.bits": 48},
    "widths 64, 96": {"vae.widths": [64, 96]},
    "grids 1 2 4 8": {"schedule.grids": [[n, n] for n in (1, 2, 4, 8)]},
    "grids 1 2 3 4 5 6 7 8": {"schedule.grids": [[n, n] for n in range(1, 9)]},
    "baseline, seed 1": {"seed": 1},
    "widths 128, 192": {"vae.widths": [128, 192]},
    "24 bits": {"vae.bits": 24},
}


class TimedBackbone(BackboneRecipe):
    """Remembers the processor time at which each batch was asked for: a busy neighbour does not count."""

    def __init__(self, config: TrainConfig) -> None:
        self.ticks: list[float] = []
        super().__init__(config)

    def batch(self, index: int, size: int) -> Mapping[str, Any]:
        self.ticks.append(time.process_time())
        return super().batch(index, size)


class TimedTokenizer(TokenizerRecipe):
    """The same for the tokenizer, whose first batches also set its start."""

    def __init__(self, config: TrainConfig) -> None:
        self.ticks: list[float] = []
        super().__init__(config)

    def batch(self, index: int, size: int) -> Tensor:
        self.ticks.append(time.process_time())
        return super().batch(index, size)


def settings_of(kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What all short runs of a recipe have in common, without folders."""
    values = asdict(read_config(RECIPES / f"{kind}.yaml", {**SHORT[kind], **changes}))
    folders = ("data", "val_data", "latents", *(["vae"] if kind == "backbone" else []))
    options = {name: value for name, value in values.pop("options").items() if name not in folders}
    bookkeeping = ("out", "minutes", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")
    kept = {name: value for name, value in values.items() if name not in bookkeeping}
    return {**kept, "betas": list(kept["betas"]), "options": options}


def config_of(study: Study, kind: str, name: str, changes: Mapping[str, Any]) -> TrainConfig:
    options = study.options
    values = {**SHORT[kind], **ALL, **options.set, **changes, "data": study.data, "val_data": study.val_data}
    values["out"] = str(folder_of(options.runs, kind, name))
    if kind == "backbone":
        values["vae"] = str(built_in_folder("toybox") / "vae") if options.model == "toybox" else f"{options.model}/vae"
        values["latents"] = options.latents or str(options.runs / "latents")  # the same for all
    return read_config(RECIPES / f"{kind}.yaml", values)


def folder_of(runs: Path, kind: str, name: str) -> Path:
    return runs / kind / name.replace(",", "").replace("/", "by").replace(" ", "-")


def measure_backbone(study: Study, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train one variant and measure the averaged weights, the last ones, and a history with mistakes."""
    config = config_of(study, "backbone", name, changes)
    recipe = TimedBackbone(config)
    result = train(recipe, config)
    renders, count = Renders(study.val_data), study.options.held_out
    averaged = VARControlPipeline.from_pretrained(result)
    recipe.model.eval()
    measured = {
        "averaged": held_out(averaged, renders, count),
        "last": held_out(recipe.pipeline(), renders, count),
        "mistaken history": held_out(averaged, renders, count, flipped=FLIPPED),
    }
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in recipe.model.parameters()),
        "gflop": teacher_forced_gflop(averaged, renders),
        "images_per_second": rate(recipe.ticks, config.batch),
    }
    for which, losses in measured.items():
        row[which] = summary(losses) | change(losses, Path(config.out).parent, name, which)
    return row


def measure_tokenizer(study: Study, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train one variant and measure what its averaged weights make of the scenes."""
    config = config_of(study, "tokenizer", name, changes)
    recipe = TimedTokenizer(config)
    vae: Any = BSQTokenizer.from_pretrained(train(recipe, config) / "vae").eval()
    schedule = ScaleSchedule.from_dict(config.options["schedule"])
    scores = study.fidelity(reconstruct(vae, study.references, schedule))
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "bits_a_picture": schedule.length * vae.target.width,
        "images_per_second": rate(recipe.ticks, config.batch),
        **summary(scores),
        **change(scores, Path(config.out).parent, name, "scores"),
    }


def rate(ticks: Sequence[float], batch: int) -> float | None:
    """Pictures per second of processor time; None where a finished run was only read."""
    return batch / float(np.median(np.diff(ticks))) if len(ticks) > 1 else None


@torch.inference_mode()
def held_out(
    pipe: VARControlPipeline, renders: Renders, count: int, *, caption: bool = True, flipped: float = 0.0
) -> dict[str, NDArray[np.float64]]:
    """Teacher-forced bit loss in nats of each of the first pictures: "loss" and "right" bits (B,), "scales" (B, S)."""
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    noise = torch.Generator().manual_seed(0)
    found: dict[str, list[Any]] = {"loss": [], "right": [], "scales": []}
    for start in range(0, min(count, len(renders)), BATCH):
        rows = range(start, min(start + BATCH, count, len(renders)))
        latent = pipe.vae.encode(to_images(np.stack([renders.image(row) for row in rows])))
        inputs, labels, _ = pipe.vae.target.self_correct(latent, schedule, flipped, len(schedule), noise)
        texts = [renders.captions(row)[0] if caption else "" for row in rows]
        context = pipe.transformer.encode_text(pipe.encode_prompt(texts))
        logits = pipe.transformer(inputs, schedule.steps, context, KVCache())
        for one, label in zip(logits.split(1), labels.split(1), strict=True):
            loss, scales, _ = bit_loss(one, label, schedule)
            found["loss"].append(float(loss))
            found["right"].append(float(((one > 0) == label.bool()).float().mean()))
            found["scales"].append(scales.tolist())
    return {name: np.array(values) for name, values in found.items()}


@torch.no_grad()
def teacher_forced_gflop(pipe: VARControlPipeline, renders: Renders) -> float:
    """Of one picture forward, tokenizer and text encoder left out."""
    schedule = ScaleSchedule.from_dict(pipe.config["schedule"])
    inputs = torch.zeros(1, schedule.length - schedule.steps[0].n, pipe.vae.target.width)
    context = pipe.transformer.encode_text(pipe.encode_prompt([renders.captions(0)[0]]))
    with FlopCounterMode(display=False) as counter:
        pipe.transformer(inputs, schedule.steps, context, KVCache())
    return counter.get_total_flops() / 1e9


def summary(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """{name: mean over pictures, name_error: its standard error}, lists where there is a number per scale; pictures
    without a finite score do not count, and names without any are left out.
    """
    result: dict[str, Any] = {}
    for name, values in scores.items():
        known = values if values.ndim > 1 else values[np.isfinite(values)]
        if len(known):
            mean, error = known.mean(axis=0), known.std(axis=0) / max(1, len(known) - 1) ** 0.5
            result |= {name: np.round(mean, 5).tolist(), f"{name}_error": np.round(error, 5).tolist()}
    return result


def change(scores: Mapping[str, NDArray[np.float64]], runs: Path, name: str, which: str) -> dict[str, Any]:
    """Keeps the scores beside the run; returns the `summary` of their differences from the baseline's, picture by
    picture, or nothing where that was not trained in these `runs`.
    """
    file = folder_of(runs.parent, runs.name, name) / f"{which.replace(' ', '-')}.npz"
    np.savez(file, **scores)
    base = folder_of(runs.parent, runs.name, "baseline") / file.name
    if name == "baseline" or not base.is_file():
        return {}
    with np.load(base) as before:
        return summary({f"{one}_change": values - before[one] for one, values in scores.items()})
