"""What limits.py asks of the model as it is: true scales first, other settings of a call, kept scales, and its fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from limits_page import SCALES
from limits_training import held_out, settings_of, summary
from numpy.typing import NDArray
from proof.shares import ratio
from torch import Tensor

from scaleweaver import VARControlPipeline
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.doctor import processor
from scaleweaver.evaluate.attributes import FACTS, AttributeJudge, facts
from scaleweaver.evaluate.control import canny_f1, psnr
from scaleweaver.evaluate.examples import ToyboxExamples
from scaleweaver.evaluate.fidelity import CALL
from scaleweaver.train.data import Pixels, Renders, as_pixels, fingerprint, save_grid, to_images

BATCH = 25
SHOWN = 2  # scenes of each number of things on the contact sheet
RIGHT = dict[str, list[bool]]  # of one picture: `attributes.facts`

# row -> what differs from the model's own call; lists have a number for each of its six scales
SAMPLING: dict[str, dict[str, Any]] = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 5": {"guidance_scale": 5.0},
    "guidance 8": {"guidance_scale": 8.0},
    "guidance 1 to 6, rising": {"guidance_scale": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
    "guidance 6 to 1, falling": {"guidance_scale": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]},
    "temperature 0.01": {"temperature": 0.01},
    "temperature 1": {"temperature": 1.0},
    "temperature 1 to 0.01, falling": {"temperature": [1.0, 0.8, 0.6, 0.4, 0.2, 0.01]},
    "temperature 1, top-p 0.7": {"temperature": 1.0, "top_p": 0.7},
}


class Study:
    """The model, scenes of the validation split, and what several parts share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipe = VARControlPipeline.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.schedule = self.pipe._plan(None, None, None, None)
        if len(self.schedule) + 1 != len(SCALES):
            raise ValueError(f"{options.model} draws {len(self.schedule)} scales; the rows are for {len(SCALES) - 1}")
        judge, estimator = options.judge, options.estimator
        self.judge = AttributeJudge.from_pretrained(judge).eval() if judge else AttributeJudge.built_in()
        self.estimator = ToyboxEstimator.from_pretrained(estimator) if estimator else ToyboxEstimator.built_in()
        data = ToyboxExamples("val", ["canny", "pose"], size=self.schedule.height, people=False)
        self.world = data.settings["version"]
        self.examples = []
        for start in range(0, options.count, BATCH):
            self.examples += data.read(range(start, min(start + BATCH, options.count)))
        self.references: Pixels = np.stack([example.reference for example in self.examples])  # (B, H, W, 3)
        self.asked = [example.asked or {} for example in self.examples]
        sources = yaml.safe_load(options.data.read_text(encoding="utf-8"))
        self.data, self.val_data = sources["data"], sources["val_data"]

    @cached_property
    def latents(self) -> Tensor:
        """What the encoder makes of the true pictures, (B, d, Hl, Wl)."""
        with torch.no_grad():
            return torch.cat([self.pipe.vae.encode(to_images(part)) for part in _parts(self.references)])

    @cached_property
    def plain(self) -> list[RIGHT]:
        """What is right in the first pictures drawn with the model's own settings, to compare others with."""
        return self.read(self.draw(range(self.options.sampled)))

    def draw(self, rows: Sequence[int], scales: int = 0, **call: Any) -> Pixels:
        """Some scenes, scene i with seed i; their first `scales` are those of the true pictures."""
        target, parts = self.pipe.vae.target, []
        for start in range(0, len(rows), BATCH):
            some = list(rows[start : start + BATCH])
            codes = self.pipe.vae.quantize(self.latents[some], self.schedule)[0][:scales]
            forced = [target.pack(bits) for bits in codes] or None
            prompts = [self.examples[i].prompt for i in some]
            drawn = self.pipe(prompts, seed=some, forced=forced, output_type="np", **call).images
            parts.append((drawn * 255).round().astype(np.uint8))
        return np.concatenate(parts)

    def read(self, pictures: Pixels, shift: int = 0) -> list[RIGHT]:
        """What the judge finds right; with a `shift`, of what the prompts of other scenes ask."""
        asked = [self.asked[(i + shift) % len(self.asked)] for i in range(len(pictures))]
        return [facts(found, one) for found, one in zip(self.judge.judge(pictures), asked, strict=True)]

    def fidelity(self, pictures: Pixels) -> dict[str, NDArray[np.float64]]:
        """Of each picture against the true one: PSNR in dB, canny F1 within one pixel, whether somebody was found, and
        mean distance in pixels of that person's joints; the last two are nan where nobody was or was found.
        """
        scores: dict[str, list[float]] = {"psnr": [], "f1_1px": [], "person": [], "joints_px": []}
        people = self.estimator.poses(pictures)
        for picture, example, found in zip(pictures, self.examples, people, strict=True):
            wanted = example.targets["pose"]
            scores["psnr"].append(psnr(picture, example.reference))
            scores["f1_1px"].append(canny_f1(picture, example.targets["canny"])["f1_1px"])
            scores["person"].append(float(len(found) > 0) if len(wanted) else np.nan)
            scores["joints_px"].append(joint_distance(found[0], wanted[0]) if len(found) and len(wanted) else np.nan)
        return {name: np.array(values) for name, values in scores.items()}

    def settings(self) -> dict[str, Any]:
        """What the numbers of every part depend on; numbers of other settings are not mixed with these."""
        options, networks = self.options, {"judge": self.judge, "estimator": self.estimator}
        networks |= {name: getattr(self.pipe, name) for name in ("transformer", "text_encoder", "vae")}
        scenes, losses = {"count": options.count}, {"held_out": options.held_out}
        model = {
            "weights": {name: fingerprint(network) for name, network in networks.items()},
            "call": {name: self.pipe.config.get(name) for name in CALL},
            "world": self.world,
            "split": "val",
            "processor": processor(),
        }
        counts = {"prefix": scenes, "sampling": {"count": options.sampled}, "kept": scenes, "fit": losses}
        counts |= {"backbones": losses, "tokenizers": scenes}
        recipes = {"backbones": "backbone", "tokenizers": "tokenizer"}
        parts = {
            name: counts[name] | (settings_of(recipes[name], options.set) if name in recipes else {})
            for name in options.parts
        }
        return {"model": model} | parts


def prefix(study: Study, row: str) -> dict[str, Any]:
    """What the judge finds, by the number of things asked for, if the first scales are those of the true picture."""
    everyone = range(len(study.examples))
    if row == "true pictures":
        return by_things(study, study.read(study.references))
    if row == "prompts of other scenes":
        return by_things(study, study.read(study.draw(everyone), shift=1))
    return by_things(study, study.read(study.draw(everyone, SCALES.index(row))))


def by_things(study: Study, found: Sequence[RIGHT]) -> dict[str, Any]:
    things = [asked["count"] for asked in study.asked]
    groups = {"all": found}
    for number in sorted(set(things)):
        groups[str(number)] = [one for one, n in zip(found, things, strict=True) if n == number]
    return {name: {"pictures": len(group)} | shares(group) for name, group in groups.items()}


def sampling(study: Study, row: str) -> dict[str, Any]:
    """What the judge finds under other settings of the call, and how much more than under the model's own."""
    if row == "as shipped":
        return shares(study.plain)
    found = study.read(study.draw(range(study.options.sampled), **SAMPLING[row]))
    return shares(found) | shares(found, study.plain)


def kept(study: Study, row: str) -> dict[str, Any]:
    """The true picture through the tokenizer when only its first scales are kept, and the meters' own mistakes."""
    if row == "true pictures":
        pictures = study.references
    else:
        scales = study.pipe.vae.target.quantize(study.latents, study.schedule)
        latent = next(scale.latent for scale in scales if SCALES[scale.step.index + 1] == row)
        with torch.no_grad():
            pictures = np.concatenate([as_pixels(study.pipe.vae.decode(part)) for part in latent.split(BATCH)])
    return summary(study.fidelity(pictures))


def fit(study: Study, row: str) -> dict[str, Any]:
    """The teacher-forced loss of the shipped model on pictures of its training and on others."""
    renders = Renders(study.val_data if row.startswith("held out") else study.data)
    losses = held_out(study.pipe, renders, study.options.held_out, caption="without" not in row)
    return summary(losses)


def shares(found: Sequence[RIGHT], before: Sequence[RIGHT] | None = None) -> dict[str, float | None]:
    """{fact: share of right ones, fact_error: its standard error over pictures}; the change of both from `before`."""
    result: dict[str, float | None] = {}
    for name in FACTS:
        asked = np.array([len(one.get(name, ())) for one in found])
        right = np.array([sum(one.get(name, ())) for one in found])
        if before is not None:
            right = right - np.array([sum(one.get(name, ())) for one in before])
        if (figure := ratio(right, asked)) is not None:
            label = name if before is None else f"{name}_change"
            result[label], result[f"{label}_error"] = figure
    return result


def joint_distance(found: NDArray[np.floating], wanted: NDArray[np.floating]) -> float:
    """Mean distance in pixels of the joints (18, 3) that are wanted."""
    there = wanted[:, 2] > 0
    return float(np.linalg.norm(found[there, :2] - wanted[there, :2], axis=1).mean())


def _parts(pictures: Pixels) -> Iterator[Pixels]:
    for start in range(0, len(pictures), BATCH):
        yield pictures[start : start + BATCH]


def sheet(study: Study, path: Path) -> None:
    """The first scenes of each number of things: drawn with 0, 1, ... true scales, and last the true picture."""
    things = [asked["count"] for asked in study.asked]
    rows = [i for number in sorted(set(things)) for i in [j for j, n in enumerate(things) if n == number][:SHOWN]]
    columns = [study.draw(rows, scales) for scales in range(len(SCALES))] + [study.references[rows]]
    save_grid(path, np.stack(columns, axis=1).reshape(-1, *study.references.shape[1:]), columns=len(columns))
