"""The parts of the evaluation; each measures something and returns what is written to the result file."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from proof.evaluation import FULL, HALF, Evaluation, other
from proof.shares import alike, found, mean, ratio
from scaleweaver.cache import KVCache
from scaleweaver.controls.blazepose import WHEEL, BlazePose
from scaleweaver.controls.openpose import COCO_18
from scaleweaver.evaluate.meters import Column, Meter, means, pose_meter
from scaleweaver.hub import built_in_folder, locate
from scaleweaver.reference import ReferenceInjector
from scaleweaver.toybox.dataset import caption_of
from scaleweaver.train.data import Pixels, fingerprint, to_images
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.tokenizer import reconstruction_scores


def tokenizer(run: Evaluation) -> dict[str, Any]:
    """PSNR and edges of reconstructions: what a perfect transformer could reach."""
    return reconstruction_scores(run.reconstructed, run.test.references)


@torch.inference_mode()
def bits(run: Evaluation) -> dict[str, Any]:
    """Share of right bits per scale given all coarser ones, without noise; the captions are those of training."""
    everyone = run.rows("", fewer=True)
    result = {"caption": right_bits(run, everyone), "empty prompt": right_bits(run, everyone, caption=False)}
    for kind in run.kinds:
        # an adapter that also reads the prompt has no bank of its own
        if run.pipe.controls[kind].config.condition_modulation == "null":
            rows = run.rows(kind, fewer=True)
            result[f"caption and {_among(kind, rows, len(everyone))}"] = right_bits(run, rows, kind)
    return result | {"pictures": len(everyone)}


def right_bits(run: Evaluation, rows: Sequence[int], kind: str = "", *, caption: bool = True) -> list[float]:
    """One share per scale."""
    pipe, schedule = run.pipe, run.schedule
    total = torch.zeros(len(schedule))
    for start in range(0, len(rows), run.options.batch):
        some = rows[start : start + run.options.batch]
        latent = pipe.vae.encode(to_images(run.test.references[some]))
        inputs, labels, _ = pipe.vae.target.labels(latent, schedule)
        texts = [caption_of(run.test.split, i) for i in some] if caption else [""] * len(some)
        context = pipe.transformer.encode_text(pipe.encode_prompt(texts))
        injectors = []
        if kind:
            bank = pipe.encode_control(run.test.maps(kind, some), kind).bank
            injectors = [ReferenceInjector(bank, pipe.controls[kind], [1.0] * len(schedule), images=len(some))]
        logits = pipe.transformer(inputs, schedule.steps, context, KVCache(), injectors=injectors)
        total += bit_loss(logits, labels, schedule)[2] * len(some)  # (S,)
    return [round(value, 4) for value in (total / len(rows)).tolist()]


def _among(kind: str, rows: Sequence[int], everyone: int) -> str:
    """The name of a control, and on which scenes if not on all."""
    return kind if len(rows) == everyone else f"{kind} ({len(rows)} scenes with people)"


def control(run: Evaluation) -> dict[str, Any]:
    """What is found of each control in pictures drawn under it, with and without it, and the bounds."""
    result = {}
    for kind in run.kinds:
        meter, rows, some = run.meter(kind), run.rows(kind), run.rows(kind, fewer=True)
        compared: dict[str, tuple[Pixels, list[int]]] = {  # pictures, and the scenes whose maps they should show
            f"strength {FULL}": (run.drawn(kind, FULL), rows),
            f"strength {HALF}": (run.drawn(kind, HALF), some),
            "without control": (run.drawn()[rows], rows),
            "map of another scene": (run.drawn(kind, FULL, wrong=True), other(some)),
            f"chance: strength {FULL} against another map": (run.drawn(kind, FULL), other(rows)),
            "reconstructed reference": (run.reconstructed[rows], rows),
            "meter on true renders": (run.test.references[rows], rows),
        }
        scores = {name: meter.measure(seen, run.test.targets(kind, of)) for name, (seen, of) in compared.items()}
        table = {name: {"pictures": len(s)} | meter.summarise([[one] for one in s]) for name, s in scores.items()}
        first = rows[:4]
        same = np.array_equal(run.draw(run.test, first, kind, 0.0, first), run.drawn()[first])
        result[kind] = {
            "meter": meter.source,
            "columns": [vars(column) for column in meter.columns],
            "rows": table,
            "half way": half_way(meter, *(scores[name][: len(some)] for name in list(scores)[:3])),
            "strength 0 equals no control": same,
        }
    return result


def half_way(
    meter: Meter,
    full: Sequence[Mapping[str, Any]],
    half: Sequence[Mapping[str, Any]],
    none: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Where strength 0.5 stands between 0 and 1 on the same scenes: its share of the way, and both distances.

    The distances, from strength 0 up and to strength 1, are means of pairs with their standard errors; positive is
    between the ends.
    """
    column = next(column for column in meter.columns if column.name == meter.main)
    ends = [np.array([one[column.name] for one in scores], float) for scores in (none, half, full)]
    low, middle, high = ends if column.higher else [-end for end in ends]
    whole = float((high - low).mean())
    share = float((middle - low).mean()) / whole if whole else None
    return {"pictures": len(half), "share": share, "from 0": mean(middle - low), "to 1": mean(high - middle)}


def attributes(run: Evaluation) -> dict[str, Any]:
    """What the prompts asked for and the judge found; its own mistakes show on the true renders."""
    asked = run.test.asked
    rows = {
        "true renders": run.facts(run.test.references, asked),
        "tokenizer reconstructions": run.facts(run.reconstructed, asked),
        "prompt alone": run.facts(run.drawn(), asked),
    }
    for kind in run.kinds:
        of = run.rows(kind)
        name = f"prompt and {_among(kind, of, len(asked))}"
        rows[name] = run.facts(run.drawn(kind, FULL), [asked[i] for i in of])
    rows["other prompts"] = run.facts(run.drawn(), [*asked[1:], asked[0]])
    return {name: found(facts) for name, facts in rows.items()} | {"judge": fingerprint(run.judge)}


def heldout(run: Evaluation) -> dict[str, Any]:
    """The same on combinations that no training saw, beside the test scenes weighed to be made up as these are."""
    scenes, everyone = run.heldout, list(range(len(run.heldout.prompts)))
    weights = alike(run.test.asked, scenes.asked)
    result: dict[str, Any] = {
        "attributes": {
            "true renders, seen": found(run.facts(run.test.references, run.test.asked), weights),
            "true renders, held out": found(run.facts(scenes.references, scenes.asked)),
            "prompt alone, seen": found(run.facts(run.drawn(), run.test.asked), weights),
            "prompt alone, held out": found(run.facts(run.draw(scenes, everyone), scenes.asked)),
        },
        "judge": fingerprint(run.judge),
    }
    if (kind := "canny") in run.kinds:
        meter = run.meter(kind)
        column = next(column for column in meter.columns if column.name == meter.main)
        pictures = {"seen": run.drawn(kind, FULL), "held out": run.draw(scenes, everyone, kind, FULL, everyone)}
        result["control"] = {"kind": kind, "meter": meter.source, "column": vars(column)}
        for name, of in (("seen", run.test), ("held out", scenes)):
            scores = meter.measure(pictures[name], of.targets(kind, everyone))
            values = [one[column.name] for one in scores]
            result["control"][name] = ratio(values, np.ones(len(values)), weights if of is run.test else None)
    return result


def blazepose(run: Evaluation) -> dict[str, Any] | None:
    """The pose control, read by a network that knows photos of people and nothing of this world.

    None, and a line that says why, where its weights cannot be had.
    """
    if "pose" not in run.kinds:
        return None
    try:
        network = BlazePose.load()
    except OSError as error:
        print(f"blazepose: not measured: {error}", file=sys.stderr)
        return None
    rows = run.rows("pose")
    pictures = {
        f"strength {FULL}": run.drawn("pose", FULL),
        "without control": run.drawn()[rows],
        "reconstructed reference": run.reconstructed[rows],
        "meter on true renders": run.test.references[rows],
    }
    meter = pose_meter(
        lambda seen: [network.keypoints(picture) for picture in seen], f"BlazePose of {WHEEL.requirement}"
    )
    return {"meter": meter.source} | either_side(meter, pictures, run.test.targets("pose", rows))


def either_side(meter: Meter, pictures: Mapping[str, Pixels], targets: Sequence[Any]) -> dict[str, Any]:
    """Columns and rows of what a meter of poses finds of the key points `targets`.

    Who sees no face may take a front for a back, and all joints of the left side for those of the right one; so the
    joints are also counted with the sides that fit a picture better.
    """
    sides = [COCO_18.index(_other_side(name)) for name in COCO_18]
    table: dict[str, Any] = {}
    for name, seen in pictures.items():
        scores = []
        for people, wanted in zip(meter.read(seen), targets, strict=True):
            score, swapped = meter.compare(people, wanted), meter.compare(people[:, sides], wanted)
            scores.append(score | {"pck_either": max(score["pck"], swapped["pck"])})
        groups = [[one] for one in scores]
        table[name] = {"pictures": len(scores)} | meter.summarise(groups) | means(groups, ["pck_either"])
    either = Column("pck_either", "PCK@0.1, either side", True, note="left and right as they fit better")
    return {"columns": [vars(column) for column in (meter.columns[0], either, *meter.columns[1:])], "rows": table}


def _other_side(joint: str) -> str:
    return joint.replace("left ", "right ") if joint.startswith("left ") else joint.replace("right ", "left ")


def size(run: Evaluation) -> dict[str, Any]:
    """Megabytes of weights of the model with its controls, and of the networks that ship beside it."""
    options = run.options
    folders = {"model and controls": locate(options.model), "judge": Path(options.judge or built_in_folder("judge"))}
    folders["estimator"] = Path(options.estimator or built_in_folder("estimator"))
    each = {name: sum(f.stat().st_size for f in at.rglob("*.safetensors")) / 1e6 for name, at in folders.items()}
    return each | {"together": sum(each.values())}


def speed(run: Evaluation) -> dict[str, Any]:
    """Seconds per picture, one at a time, after a warm-up; the median of several."""
    pipe, prompts = run.pipe, run.test.prompts
    calls: dict[str, Callable[[int], Any]] = {"prompt": lambda i: pipe(prompts[i], seed=i)}
    if run.kinds:
        kind = run.kinds[0]
        maps = run.test.maps(kind, range(len(prompts)))
        encoded = pipe.encode_control(maps[0], kind)
        calls[f"prompt and {kind}"] = lambda i: pipe(prompts[i], control={kind: maps[i]}, seed=i)
        calls[f"prompt and encoded {kind}"] = lambda i: pipe(prompts[i], control={kind: encoded}, seed=i)
    times: dict[str, list[float]] = {label: [] for label in calls}
    load = os.getloadavg()[0]
    for i in [0, 0, *range(min(24, len(prompts)))]:
        for label, call in calls.items():  # in turns, so that a busy moment does not meet one of them alone
            started = time.perf_counter()
            call(i)
            times[label].append(time.perf_counter() - started)
    result: dict[str, Any] = {}
    for label, seconds in times.items():
        result[label] = {"seconds": statistics.median(seconds[2:]), "fastest": min(seconds[2:])}
    return result | {"threads": torch.get_num_threads(), "load before": load}


PARTS: dict[str, Callable[[Evaluation], dict[str, Any] | None]] = {
    "tokenizer": tokenizer, "bits": bits, "control": control, "attributes": attributes, "heldout": heldout,
    "blazepose": blazepose, "size": size, "speed": speed,
}  # fmt: skip
