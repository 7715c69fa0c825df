"""How good is the built-in model? Measured on scenes of the test split, which no training saw.

python benchmarks/evaluate_toybox.py --workers 2 --sheets scaleweaver/assets/toybox \
    --into README.md --into scaleweaver/assets/toybox/README.md
python benchmarks/evaluate_toybox.py --parts speed --threads 1 --out out/speed.json

Prompts are `explicit_caption`s: they say everything that is asked of the pictures afterwards. Every number has its
bounds beside it: the tokenizer's own reconstruction and the meter on true renders above, unrelated pairs below. Each
part is written as soon as it is measured; a later call with the same settings goes on with the missing parts.
Documents show what fits between their marks: measured (all tables), targets (the first one), pictures (the sheets).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from proof.documents import fill, places
from proof.evaluation import Evaluation
from proof.parts import PARTS
from proof.sheets import picture_text, write_sheets
from proof.tables import documents

from scaleweaver.evaluate.report import machine
from scaleweaver.train.data import fingerprint

RESULT = Path(__file__).parent / "results" / "toybox.json"
EARLIER = RESULT.with_name("toybox-earlier.json")
PLACES = ("measured", "targets")  # in documents, and "pictures" where there are sheets


def kept_parts(run: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier report that still hold; a report of other weights is not replaced unasked."""
    options = run.options
    if not options.out.is_file():
        return {}
    before = json.loads(options.out.read_text(encoding="utf-8"))
    if before["settings"] != settings:
        if options.again:
            return {}
        raise ValueError(f"{options.out} holds numbers of other weights or settings; pass another --out, or --again")
    parts = dict(before["parts"])
    for name in ("attributes", "heldout"):
        if name in parts and parts[name]["judge"] != fingerprint(run.judge):
            parts.pop(name)
    if any(part["meter"] != run.meter(kind).source for kind, part in parts.get("control", {}).items()):
        parts.pop("control")
    return {name: (value, before["commands"][name]) for name, value in parts.items()}


def measure(run: Evaluation, command: str) -> dict[str, Any]:
    """The report with all parts asked for, written after each of them."""
    options = run.options
    settings = run.settings()
    kept = kept_parts(run, settings)
    report: dict[str, Any] = {"settings": settings, "machine": machine()}
    report["parts"] = {name: part for name, (part, _) in kept.items()}
    report["commands"] = {name: command for name, (_, command) in kept.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        if name in report["parts"] and not options.again:
            continue
        started = time.perf_counter()
        part = PARTS[name](run)
        if part is None:
            report["parts"].pop(name, None)
        else:
            report["parts"][name], report["commands"][name] = part, command
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return report


def show(report: dict[str, Any], options: argparse.Namespace) -> None:
    """The tables beside the result file, in the documents and on the screen."""
    earlier = json.loads(options.earlier.read_text(encoding="utf-8")) if options.earlier.is_file() else None
    texts = documents(report, earlier)
    options.out.with_suffix(".md").write_text(texts["measured"], encoding="utf-8")
    for document in options.into:
        pictures = {"pictures": picture_text(document, options.sheets)} if options.sheets else {}
        fill(document, texts | pictures)
    print(texts["measured"])


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="the built-in model, a folder or a Hub repository")
    parser.add_argument("--judge", type=Path, help="folder of an AttributeJudge; the built-in one unless given")
    parser.add_argument("--estimator", type=Path, help="folder of a ToyboxEstimator; the built-in one unless given")
    parser.add_argument("--controls", help='names with commas, "" for none; all that the model has unless given')
    parser.add_argument("--count", type=int, default=500, help="scenes, as many held-out ones again")
    parser.add_argument(
        "--side-count", type=int, default=200, help="of these for right bits, strength 0.5 and maps of other scenes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw, with one thread each")
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure parts again that the result file holds")
    parser.add_argument("--earlier", type=Path, default=EARLIER, help="the result file of the weights to compare with")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets, that of the model for its cards")
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents that show the tables")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    options.parts = [name for name in options.parts.split(",") if name]
    if options.controls is not None:
        options.controls = [name for name in options.controls.split(",") if name]
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    for document in options.into:
        try:
            places(document, [*PLACES, "pictures"] if options.sheets else PLACES)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Evaluation(options)
    if "attributes" in options.parts:
        run.judge.eval()  # complains now, not after the drawing, where there is none
    given = sys.argv[1:] if arguments is None else arguments
    try:
        report = measure(run, shlex.join(["python", "benchmarks/evaluate_toybox.py", *given]))
        if options.sheets:
            write_sheets(run, options.sheets)
    finally:
        run.painter.close()
    show(report, options)


if __name__ == "__main__":
    main()
