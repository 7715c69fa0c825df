"""How well does the built-in estimator read depth and joints? Measured on scenes of the test split, never trained on.

python benchmarks/estimator.py --into scaleweaver/assets/estimator/README.md

Tokenizer reconstructions are what the best generator could give it: their scores are the floor of an error that is
measured with this network. Answers to other scenes (people to other people) show what a guess is worth.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from proof.documents import split_at_marks

from scaleweaver import VARControlPipeline
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.report import machine
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.store import stored_arrays
from scaleweaver.train.data import Pixels, fingerprint, save_grid
from scaleweaver.train.estimator import Example, scores, sheet
from scaleweaver.train.tokenizer import reconstruct

RESULT = Path(__file__).parent / "results" / "estimator.json"
CHUNK = 32  # scenes rendered together
SHOWN = 24


def examples(count: int, size: int) -> list[Example]:
    """The first scenes of the test split with their exact maps."""
    found: list[Example] = []
    for start in range(0, count, CHUNK):
        arrays = stored_arrays(draw_batch("test", range(start, min(start + CHUNK, count)), size=size))
        rows = zip(arrays["images"], arrays["depth"], arrays["keypoints"], strict=True)
        found += [Example(picture, depth, points) for picture, depth, points in rows]
    return found


def others(truth: Sequence[Example]) -> Pixels:
    """For each scene the picture of another one, of people where there is a person."""
    pictures = np.stack([example.picture for example in truth])
    people = np.array([example.points.any() for example in truth])
    turned = pictures.copy()
    for group in (np.flatnonzero(people), np.flatnonzero(~people)):
        turned[group] = pictures[np.roll(group, 1)]
    return turned


def speed(estimator: ToyboxEstimator, picture: Pixels) -> dict[str, Any]:
    """Milliseconds for one picture, after a warm-up: median and fastest of several."""
    calls: dict[str, Callable[[Pixels], Any]] = {"depth": estimator.depth, "key points": estimator.keypoints}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(105):
        for name, call in calls.items():
            started = time.perf_counter()
            call(picture)
            times[name].append(1000 * (time.perf_counter() - started))
    kept = {name: values[5:] for name, values in times.items()}
    return {n: {"median": round(statistics.median(v), 2), "fastest": round(min(v), 2)} for n, v in kept.items()}


def table(report: dict[str, Any]) -> str:
    """The report as markdown."""
    scenes, device = report["settings"], report["machine"]
    lines = [f"{scenes['count']} scenes of the test split, {scenes['people']} of them with a person.", ""]
    lines += ["```bash", report["command"], "```", ""]
    lines += [
        "| pictures | depth, aligned RMSE | sky | joints, PCK@0.1 | somebody or nobody |",
        "|---|---|---|---|---|",
    ]
    for name, values in report["scores"].items():
        cells = (f"{values[key]:.3f}" for key in ("depth_rmse", "sky", "pck", "presence"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| one picture, {device['threads']} thread | median, ms | fastest, ms |", "|---|---|---|"]
    for name, spent in report["milliseconds"].items():
        lines.append(f"| {name} | {spent['median']:.1f} | {spent['fastest']:.1f} |")
    versions = f"torch {device['versions']['torch']}; load before: {device['load before']:.1f}"
    lines += ["", f"{device['processor']}, {device['cores']} cores, {versions}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", type=Path, help="a folder in place of the built-in weights")
    parser.add_argument("--model", default="toybox", help="whose tokenizer; the built-in model, a folder or a Hub id")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument(
        "--sheet", type=Path, help="PNG of the first scenes: picture, true depth, found depth, skeleton"
    )
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents that show the table")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    parts = [(document, *split_at_marks(document)) for document in options.into]
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    folder = options.estimator
    estimator = ToyboxEstimator.from_pretrained(folder).eval() if folder else ToyboxEstimator.built_in()
    pipe = VARControlPipeline.from_pretrained(options.model)
    truth = examples(options.count, estimator.config["size"])
    pictures = np.stack([example.picture for example in truth])
    reconstructed = reconstruct(pipe.vae, pictures, ScaleSchedule.from_dict(pipe.config["schedule"]))
    given = {"true renders": pictures, "tokenizer reconstructions": reconstructed, "other scenes": others(truth)}
    report = {
        "command": shlex.join(
            ["python", "benchmarks/estimator.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "settings": {
            "count": options.count,
            "people": sum(bool(example.points.any()) for example in truth),
            "weights": {"estimator": fingerprint(estimator), "vae": fingerprint(pipe.vae)},
        },
        "machine": machine() | {"threads": torch.get_num_threads(), "load before": load},
        "scores": {name: scores(estimator, some, truth) for name, some in given.items()},
        "milliseconds": speed(estimator, pictures[0]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table(report)
    for document, head, tail in parts:
        document.write_text(head + text + tail, encoding="utf-8")
    if options.sheet:
        save_grid(options.sheet, sheet(estimator, truth[:SHOWN]), columns=8)
    print(text)


if __name__ == "__main__":
    main()
