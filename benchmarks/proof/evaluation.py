"""The model, the scenes it is measured on, the networks that look at its pictures, and the pictures, drawn once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from proof.painter import Painter, load
from scaleweaver import Control
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.doctor import processor
from scaleweaver.evaluate.attributes import AttributeJudge, facts
from scaleweaver.evaluate.examples import EXACT, ToyboxExamples, meter_of, partner
from scaleweaver.evaluate.fidelity import CALL
from scaleweaver.evaluate.meters import Meter
from scaleweaver.train.data import Pixels, fingerprint
from scaleweaver.train.tokenizer import reconstruct

FULL, HALF = 1.0, 0.5  # strengths of a control
FIVE = ("kind", "color", "count", "relation", "pose")  # the facts that the model was made for


class Scenes:
    """The first scenes of a split: prompts, true pictures, maps, and what is asked of the pictures."""

    def __init__(self, split: str, kinds: Sequence[str], count: int, *, size: int, batch: int) -> None:
        self.split = split
        self.data = ToyboxExamples(split, kinds, size=size, people=False)
        self.examples = []
        for start in range(0, count, batch):
            self.examples += self.data.read(range(start, min(start + batch, count)))
        self.references: Pixels = np.stack([example.reference for example in self.examples])  # (B, H, W, 3)
        self.prompts = [example.prompt for example in self.examples]
        self.asked = [example.asked or {} for example in self.examples]

    def maps(self, kind: str, rows: Sequence[int]) -> list[Pixels]:
        return [self.examples[i].maps[kind] for i in rows]

    def targets(self, kind: str, rows: Sequence[int]) -> list[Any]:
        return [self.examples[i].targets[kind] for i in rows]


class Evaluation:
    """What the parts share. `options` are those of evaluate_toybox.py."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipe = load(options.model)
        loaded = self.pipe.available_controls
        self.kinds: list[str] = list(loaded) if options.controls is None else options.controls
        if missing := sorted(set(self.kinds) - set(loaded)):
            raise ValueError(
                f"{options.model} has no control {', '.join(missing)}, it has {', '.join(loaded) or 'none'};"
                ' pass some of them as --controls, or --controls ""'
            )
        self.painter = Painter(
            self.pipe, options.model, seed=options.seed, batch=options.batch, workers=options.workers
        )
        self.schedule = self.painter.drawing.schedule
        self._drawn: dict[tuple[str, float, bool], Pixels] = {}

    @cached_property
    def test(self) -> Scenes:
        """Scenes of seeds and combinations of which training saw the second only."""
        options = self.options
        return Scenes("test", self.kinds, options.count, size=self.schedule.height, batch=options.batch)

    @cached_property
    def heldout(self) -> Scenes:
        """As many scenes, each with a combination of colour and kind, or of pose and shirt, that no training saw."""
        options, kinds = self.options, [kind for kind in self.kinds if kind == "canny"]
        return Scenes("heldout", kinds, options.count, size=self.schedule.height, batch=options.batch)

    @cached_property
    def judge(self) -> AttributeJudge:
        folder = self.options.judge
        return AttributeJudge.from_pretrained(folder).eval() if folder else AttributeJudge.built_in()

    @cached_property
    def estimator(self) -> ToyboxEstimator | None:
        """What finds depth and key points in pictures, where a control needs it."""
        if not set(self.kinds) & set(EXACT):
            return None
        folder = self.options.estimator
        return ToyboxEstimator.from_pretrained(folder).eval() if folder else ToyboxEstimator.built_in()

    @cached_property
    def reconstructed(self) -> Pixels:
        return reconstruct(self.pipe.vae, self.test.references, self.schedule)

    def meter(self, kind: str) -> Meter:
        detectors = ToyboxExamples("test", self.kinds, size=self.schedule.height, people=False)
        return meter_of(kind, detectors, self.estimator)

    def rows(self, kind: str, *, fewer: bool = False) -> list[int]:
        """The test scenes that a control is measured on: for poses, those with somebody in them."""
        count = min(self.options.side_count, self.options.count) if fewer else self.options.count
        return [i for i in range(count) if kind != "pose" or len(self.test.examples[i].targets["pose"])]

    def drawn(self, kind: str = "", strength: float = 0.0, *, wrong: bool = False) -> Pixels:
        """A picture per test scene, drawn once, under its own map or that of `other` if `wrong`; "" is no control.

        Other strengths than the full one and wrong maps bound the numbers that count: fewer scenes do.
        """
        key = (kind, strength, wrong)
        if key not in self._drawn:
            rows = self.rows(kind, fewer=bool(kind) and (wrong or strength != FULL))
            self._drawn[key] = self.draw(self.test, rows, kind, strength, other(rows) if wrong else rows)
        return self._drawn[key]

    def draw(
        self, scenes: Scenes, rows: Sequence[int], kind: str = "", strength: float = 0.0, maps: Sequence[int] = ()
    ) -> Pixels:
        """Pictures of some scenes under the maps of the scenes `maps`."""
        control = Control(kind, scenes.maps(kind, maps), scale=strength) if kind else None
        return self.painter.draw([scenes.prompts[i] for i in rows], rows, control)

    def facts(self, pictures: Pixels, asked: Sequence[dict[str, Any]]) -> list[dict[str, list[bool]]]:
        """Which facts asked of each picture the judge finds, and as "all five" whether all of FIVE are right."""
        found = [facts(one, want) for one, want in zip(self.judge.judge(pictures), asked, strict=True)]
        return [each | {"all five": [all(right for name in FIVE for right in each.get(name, ()))]} for each in found]

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on; results of other settings are not mixed with these."""
        networks = {name: getattr(self.pipe, name) for name in ("transformer", "text_encoder", "vae")}
        networks |= {kind: self.pipe.controls[kind] for kind in self.kinds}
        weights = {name: fingerprint(network) for name, network in networks.items()}
        calls = {name: self.pipe.config.get(name) for name in CALL}
        options = self.options
        chosen = {"split": "test", "count": options.count, "side_count": options.side_count, "seed": options.seed}
        return {"weights": weights, "processor": processor(), **chosen, "controls": self.kinds, **calls}


def other(rows: Sequence[int]) -> list[int]:
    """For each of these scenes another one of them."""
    return [rows[partner(place, len(rows))] for place in range(len(rows))]
