"""What limits the quality of the built-in model? One table of causes, before any long run.

python benchmarks/limits.py --latents runs/toybox/controls/latents --sheets docs/images --into docs/limits.md
python benchmarks/limits.py --parts backbones --only baseline --only muon --set steps=150 --out out/limits.json

The built-in model is taken as it is: how good its pictures get when some of their scales are the true ones (prefix),
what other settings of a call change (sampling), what the tokenizer loses (kept), and whether the training pictures are
better known than others (fit). Then short trainings with one thing changed each: limits_training.py.
Only scenes of the validation split are looked at. Every row is written as soon as it is measured, and a later call with
the same settings goes on with the missing ones.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from limits_page import SCALES, chart, table
from limits_shipped import SAMPLING, Study, fit, kept, prefix, sampling, sheet
from limits_training import BACKBONES, TOKENIZERS, measure_backbone, measure_tokenizer
from proof.documents import split_at_marks

from scaleweaver.evaluate.report import machine

RESULT = Path(__file__).parent / "results" / "limits.json"
DATA = Path(__file__).parents[1] / "recipes" / "toybox" / "controls.yaml"


@dataclass(frozen=True)
class Part:
    """A table: the names of its rows, and what measures one of them."""

    rows: tuple[str, ...]
    measure: Callable[[Study, str], dict[str, Any]]


def tokenizers(study: Study, row: str) -> dict[str, Any]:
    return measure_tokenizer(study, row, TOKENIZERS[row])


def backbones(study: Study, row: str) -> dict[str, Any]:
    return measure_backbone(study, row, BACKBONES[row])


PARTS = {
    "prefix": Part((*SCALES, "true pictures", "prompts of other scenes"), prefix),
    "sampling": Part(("as shipped", *SAMPLING), sampling),
    "kept": Part((*SCALES[1:], "true pictures"), kept),
    "fit": Part(("training", "held out", "training, without caption", "held out, without caption"), fit),
    "backbones": Part(tuple(BACKBONES), backbones),
    "tokenizers": Part(tuple(TOKENIZERS), tokenizers),
}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="the built-in model, a folder or a Hub repository")
    parser.add_argument("--judge", type=Path, help="folder of an AttributeJudge; the built-in one unless given")
    parser.add_argument("--estimator", type=Path, help="folder of a ToyboxEstimator; the built-in one unless given")
    parser.add_argument("--data", type=Path, default=DATA, help="a recipe whose data and val_data are trained on")
    parser.add_argument("--latents", help="folder of its latents by the model's tokenizer; made in --runs unless given")
    parser.add_argument("--runs", type=Path, default=Path("runs/limits"), help="folder of the short trainings")
    parser.add_argument("--count", type=int, default=200, help="scenes that are drawn or reconstructed")
    parser.add_argument("--sampled", type=int, default=100, help="scenes of each setting of the part sampling")
    parser.add_argument("--held-out", type=int, default=128, help="pictures that losses are measured on")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", action="append", metavar="ROW", help="one row of a part; may be given several times")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the short trainings")
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--sheets", type=Path, help="folder for the figure and the contact sheet")
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents that show the tables")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if options.sampled > options.count:
        parser.error(f"--sampled {options.sampled} scenes of --count {options.count}; pass at most as many")
    known = [row for part in options.parts for row in PARTS[part].rows]
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"unknown rows {', '.join(unknown)}; expected some of: {'; '.join(known)}")
    options.set = {key: yaml.safe_load(value) for key, _, value in (entry.partition("=") for entry in options.set)}
    for document in options.into:
        split_at_marks(document)  # complains now, not after the measuring
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    study = Study(options)
    settings = study.settings()
    report = earlier(options, settings) or {"settings": {}, "machine": machine(), "commands": {}, "parts": {}}
    report["settings"] |= {name: settings[name] for name in ("model", *options.parts)}
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/limits.py", *given])
    for name in options.parts:
        rows: dict[str, Any] = report["parts"].setdefault(name, {})
        for row in PARTS[name].rows:
            if row in rows or row not in (options.only or PARTS[name].rows):
                continue
            started = time.perf_counter()
            rows[row] = PARTS[name].measure(study, row)
            report["commands"][name] = command
            write(options.out, report)
            print(f"{name}, {row}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        report["parts"][name] = {row: rows[row] for row in PARTS[name].rows if row in rows}
    if options.sheets and report["parts"].get("prefix"):
        sheet(study, options.sheets / "limits-prefix.png")
        chart(report["parts"]["prefix"], options.sheets / "limits-scales.png")
    text = table(report)
    for document in options.into:
        head, tail = split_at_marks(document)
        document.write_text(f"{head}{text}\n{tail}", encoding="utf-8")
    print(text)


def earlier(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is measured already, if the parts that go on have the settings they began with."""
    if not options.out.is_file():
        return None
    report: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8"))
    for name in ("model", *(part for part in options.parts if report["parts"].get(part))):
        if (before := report["settings"][name]) != settings[name]:
            raise ValueError(
                f"{options.out} holds numbers of {name} with other settings, {before}, and this call has "
                f"{settings[name]}; pass another --out, or delete it"
            )
    return report


def write(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
