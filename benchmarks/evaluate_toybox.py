"""How good is the built-in model? Measured on scenes of the test split, which no training saw.

python benchmarks/evaluate_toybox.py --sheets out/sheets --into README.md --into scaleweaver/assets/toybox/README.md
python benchmarks/evaluate_toybox.py --parts speed --threads 1 --out out/speed.json

Prompts are `explicit_caption`s: they say everything that is asked of the pictures afterwards. Every number has its
bounds beside it: the tokenizer's own reconstruction and the meter on true renders above, unrelated pairs below. Each
part is written as soon as it is measured; a later call with the same settings goes on with the missing parts.
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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaleweaver import Control, VARControlPipeline
from scaleweaver.cache import KVCache
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.doctor import processor
from scaleweaver.evaluate.attributes import AttributeJudge, Judgement, score
from scaleweaver.evaluate.examples import EXACT, ToyboxExamples, meter_of, partner
from scaleweaver.evaluate.fidelity import CALL, Drawing
from scaleweaver.evaluate.meters import Meter
from scaleweaver.evaluate.report import machine, markdown
from scaleweaver.reference import ReferenceInjector
from scaleweaver.toybox.dataset import caption_of
from scaleweaver.train.data import Pixels, fingerprint, save_grid, to_images
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.tokenizer import reconstruct, reconstruction_scores

RESULT = Path(__file__).parent / "results" / "toybox.json"
PARTS = ("tokenizer", "bits", "control", "attributes", "speed")
EDGES = ("f1", "f1_1px", "f1_2px")
STRENGTHS = (1.0, 0.5)
SHOWN = 48  # prompts on the contact sheet
START, END = "<!-- measured -->\n", "<!-- /measured -->"  # where the tables stand in a document


class Evaluation:
    """The model, the test scenes, and pictures drawn once and shared by the parts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipe = VARControlPipeline.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        loaded = self.pipe.available_controls
        self.kinds: list[str] = list(loaded) if options.controls is None else options.controls
        if missing := sorted(set(self.kinds) - set(loaded)):
            raise ValueError(
                f"{options.model} has no control {', '.join(missing)}, it has {', '.join(loaded) or 'none'};"
                ' pass some of them as --controls, or --controls ""'
            )
        self.drawing = Drawing(self.pipe, options.seed, 1, options.batch, {})
        self.schedule = self.drawing.schedule
        self.data = ToyboxExamples(options.split, self.kinds, size=self.schedule.height, people=False)
        self.examples = []
        for start in range(0, options.count, options.batch):
            self.examples += self.data.read(range(start, min(start + options.batch, options.count)))
        self.references: Pixels = np.stack([example.reference for example in self.examples])  # (B, H, W, 3)
        self.prompts = [example.prompt for example in self.examples]
        self.asked = [example.asked or {} for example in self.examples]
        self._drawn: dict[tuple[str, float, bool], Pixels] = {}

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
        return reconstruct(self.pipe.vae, self.references, self.schedule)

    def meter(self, kind: str) -> Meter:
        return meter_of(kind, self.data, self.estimator)

    def rows(self, kind: str) -> list[int]:
        """The scenes that a control is measured on: for poses, those with somebody in them."""
        everyone = range(len(self.examples))
        return [i for i in everyone if kind != "pose" or len(self.examples[i].targets["pose"])]

    def others(self, kind: str) -> list[int]:
        """For each of these scenes another one of them."""
        rows = self.rows(kind)
        return [rows[partner(place, len(rows))] for place in range(len(rows))]

    def drawn(self, kind: str = "", strength: float = 0.0, wrong: bool = False) -> Pixels:
        """A picture per scene of `rows(kind)` under its own map, or another scene's if `wrong`; "" is no control."""
        key = (kind, strength, wrong)
        if key not in self._drawn:
            rows = self.rows(kind)
            self._drawn[key] = self.draw(rows, kind, strength, self.others(kind) if wrong else rows)
        return self._drawn[key]

    def draw(self, rows: Sequence[int], kind: str = "", strength: float = 0.0, maps: Sequence[int] = ()) -> Pixels:
        control = Control(kind, [self.examples[i].maps[kind] for i in maps], scale=strength) if kind else None
        return self.drawing.draw([self.prompts[i] for i in rows], rows, control)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on; results of other settings are not mixed with these."""
        networks = {name: getattr(self.pipe, name) for name in ("transformer", "text_encoder", "vae")}
        networks |= {kind: self.pipe.controls[kind] for kind in self.kinds}
        weights = {name: fingerprint(network) for name, network in networks.items()}
        calls = {name: self.pipe.config.get(name) for name in CALL}
        chosen = {"split": self.options.split, "count": self.options.count, "seed": self.options.seed}
        return {"weights": weights, "processor": processor(), **chosen, "controls": self.kinds, **calls}


def tokenizer(run: Evaluation) -> dict[str, Any]:
    """PSNR and edges of reconstructions: what a perfect transformer could reach."""
    return reconstruction_scores(run.reconstructed, run.references)


@torch.inference_mode()
def bits(run: Evaluation) -> dict[str, Any]:
    """Share of right bits per scale given all coarser ones, without noise; the captions are those of training."""
    everyone = run.rows("")
    result = {"caption": right_bits(run, everyone), "empty prompt": right_bits(run, everyone, caption=False)}
    for kind in run.kinds:
        # an adapter that also reads the prompt has no bank of its own
        if run.pipe.controls[kind].config.condition_modulation == "null":
            result[f"caption and {among(run, kind)}"] = right_bits(run, run.rows(kind), kind)
    return result


def among(run: Evaluation, kind: str) -> str:
    """The name of a control, and on which scenes if not on all."""
    return kind if len(run.rows(kind)) == len(run.examples) else f"{kind} ({len(run.rows(kind))} scenes with people)"


def right_bits(run: Evaluation, rows: Sequence[int], kind: str = "", *, caption: bool = True) -> list[float]:
    """One share per scale."""
    pipe, schedule = run.pipe, run.schedule
    total = torch.zeros(len(schedule))
    for start in range(0, len(rows), run.options.batch):
        some = rows[start : start + run.options.batch]
        latent = pipe.vae.encode(to_images(run.references[some]))
        inputs, labels, _ = pipe.vae.target.labels(latent, schedule)
        texts = [caption_of(run.options.split, i) for i in some] if caption else [""] * len(some)
        context = pipe.transformer.encode_text(pipe.encode_prompt(texts))
        injectors = []
        if kind:
            bank = pipe.encode_control([run.examples[i].maps[kind] for i in some], kind).bank
            injectors = [ReferenceInjector(bank, pipe.controls[kind], [1.0] * len(schedule), images=len(some))]
        logits = pipe.transformer(inputs, schedule.steps, context, KVCache(), injectors=injectors)
        total += bit_loss(logits, labels, schedule)[2] * len(some)  # (S,)
    return [round(value, 4) for value in (total / len(rows)).tolist()]


def control(run: Evaluation) -> dict[str, Any]:
    """What is found of each control in pictures drawn under it, with and without it, and the bounds."""
    result = {}
    for kind in run.kinds:
        meter, rows, others = run.meter(kind), run.rows(kind), run.others(kind)

        def measured(pictures: Pixels, of: Sequence[int], meter: Meter = meter, kind: str = kind) -> dict[str, Any]:
            scores = meter.measure(pictures, [run.examples[i].targets[kind] for i in of])
            return {"pictures": len(of)} | meter.summarise([[one] for one in scores])

        table = {f"strength {s}": measured(run.drawn(kind, s), rows) for s in STRENGTHS}
        table["without control"] = measured(run.drawn()[rows], rows)
        table["map of another scene"] = measured(run.drawn(kind, STRENGTHS[0], wrong=True), others)
        table[f"chance: strength {STRENGTHS[0]} against another map"] = measured(run.drawn(kind, STRENGTHS[0]), others)
        table["reconstructed reference"] = measured(run.reconstructed[rows], rows)
        table["meter on true renders"] = measured(run.references[rows], rows)
        some = rows[:4]
        same = np.array_equal(run.draw(some, kind, 0.0, some), run.drawn()[some])
        columns = [vars(column) for column in meter.columns]
        result[kind] = {"meter": meter.source, "columns": columns, "rows": table, "strength 0 equals no control": same}
    return result


def judged(run: Evaluation) -> dict[str, Any]:
    """What the prompts asked for and the judge found; its own mistakes show on the true renders."""
    free = run.judge.judge(run.drawn())
    found: dict[str, list[Judgement]] = {
        "true renders": run.judge.judge(run.references),
        "tokenizer reconstructions": run.judge.judge(run.reconstructed),
        "prompt alone": free,
    }
    result = {name: score(judgements, run.asked) for name, judgements in found.items()}
    for kind in run.kinds:
        asked = [run.asked[i] for i in run.rows(kind)]
        result[f"prompt and {among(run, kind)}"] = score(run.judge.judge(run.drawn(kind, STRENGTHS[0])), asked)
    result["other prompts"] = score(free, [*run.asked[1:], run.asked[0]])
    return result | {"judge": fingerprint(run.judge)}


def speed(run: Evaluation) -> dict[str, Any]:
    """Seconds per picture, one at a time, after a warm-up; the median of several."""
    pipe = run.pipe
    calls: dict[str, Callable[[int], Any]] = {"prompt": lambda i: pipe(run.prompts[i], seed=i)}
    if run.kinds:
        kind = run.kinds[0]
        maps = [example.maps[kind] for example in run.examples]
        encoded = pipe.encode_control(maps[0], kind)
        calls[f"prompt and {kind}"] = lambda i: pipe(run.prompts[i], control={kind: maps[i]}, seed=i)
        calls[f"prompt and encoded {kind}"] = lambda i: pipe(run.prompts[i], control={kind: encoded}, seed=i)
    times: dict[str, list[float]] = {label: [] for label in calls}
    load = os.getloadavg()[0]
    for i in [0, 0, *range(min(24, len(run.prompts)))]:
        for label, call in calls.items():  # in turns, so that a busy moment does not meet one of them alone
            started = time.perf_counter()
            call(i)
            times[label].append(time.perf_counter() - started)
    result: dict[str, Any] = {}
    for label, seconds in times.items():
        result[label] = {"seconds": statistics.median(seconds[2:]), "fastest": min(seconds[2:])}
    return result | {"threads": torch.get_num_threads(), "load before": load}


def sheets(run: Evaluation, folder: Path) -> None:
    """Pictures that are already drawn, and none chosen: the first scenes of the split."""
    shown = min(SHOWN, len(run.prompts))
    save_grid(folder / "reconstructions.png", _columns(run.references[:16], run.reconstructed[:16]), columns=8)
    if ("", 0.0, False) in run._drawn:
        save_grid(folder / "prompts.png", run.drawn()[:shown], columns=8)
        lines = [f"{i // 8 + 1}.{i % 8 + 1} {prompt}" for i, prompt in enumerate(run.prompts[:shown])]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in run.kinds:
        if (kind, STRENGTHS[0], False) in run._drawn:
            rows = run.rows(kind)[:24]
            maps = np.stack([run.examples[i].maps[kind] for i in rows])
            triples = _columns(maps, run.drawn(kind, STRENGTHS[0])[: len(rows)], run.references[rows])
            save_grid(folder / f"{kind}.png", triples, columns=8)  # map over result over reference


def _columns(*stacks: Pixels) -> Pixels:
    """Pictures (B, H, W, 3) of several lists over each other, (B, n H, W, 3)."""
    return np.concatenate(stacks, axis=1)


def table(report: dict[str, Any]) -> str:
    """The report as markdown."""
    settings, found = report["settings"], report["parts"]
    cores, versions = report["machine"]["cores"], report["machine"]["versions"]
    where = f"{settings['processor']}, {cores} cores, torch {versions['torch']}"
    commands = dict.fromkeys(report["commands"][name] for name in found)
    lines = [f"{settings['count']} scenes of the {settings['split']} split; {where}", ""]
    lines += ["```bash", *commands, "```", ""]
    if "tokenizer" in found:
        lines += ["| tokenizer | PSNR (dB) | canny F1 | F1, 1 px | F1, 2 px |", "|---|---|---|---|---|"]
        values = found["tokenizer"]
        lines += [f"| reconstruction | {values['psnr']:.2f} | " + _row(values[e] for e in EDGES), ""]
    if "bits" in found:
        scales = len(next(iter(found["bits"].values())))
        lines += ["| right bits given | " + " | ".join(f"scale {i + 1}" for i in range(scales)) + " |"]
        lines += ["|---" * (scales + 1) + "|"]
        lines += [f"| {name} | " + _row(values) for name, values in found["bits"].items()] + [""]
    for kind, part in found.get("control", {}).items():
        # standard errors are in the file
        heading, ruler, *rows = markdown(part, errors=False).splitlines()
        lines += [heading.replace("| |", f"| {kind}, {part['meter']} |", 1), ruler, *rows, ""]
    if found.get("attributes"):
        named = {name: values for name, values in found["attributes"].items() if isinstance(values, dict)}
        names = list(next(iter(named.values())))
        lines += ["| found by the judge | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {name} | " + _row(v.get(n) for n in names) for name, v in named.items()] + [""]
    if "speed" in found:
        lines += [f"| one picture, {found['speed']['threads']} threads | median, s | fastest, s |", "|---|---|---|"]
        named = {name: values for name, values in found["speed"].items() if isinstance(values, dict)}
        lines += [f"| {name} | {v['seconds']:.2f} | {v['fastest']:.2f} |" for name, v in named.items()] + [""]
    return "\n".join(lines)


def _row(values: Any) -> str:
    return " | ".join("-" if value is None else f"{value:.3f}" for value in values) + " |"


def split_at_marks(document: Path) -> tuple[str, str]:
    """What stands before and after the tables of a document."""
    head, start, rest = document.read_text(encoding="utf-8").partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{document} has no place for the tables; write {START.strip()} and {END} there")
    return head + start, end + tail


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
    if "attributes" in parts and parts["attributes"]["judge"] != fingerprint(run.judge):
        parts.pop("attributes")
    if any(part["meter"] != run.meter(kind).source for kind, part in parts.get("control", {}).items()):
        parts.pop("control")
    return {name: (value, before["commands"][name]) for name, value in parts.items()}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="the built-in model, a folder or a Hub repository")
    parser.add_argument("--judge", type=Path, help="folder of an AttributeJudge; the built-in one unless given")
    parser.add_argument("--estimator", type=Path, help="folder of a ToyboxEstimator; the built-in one unless given")
    parser.add_argument("--controls", help='names with commas, "" for none; all that the model has unless given')
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument(
        "--split", default="test", help='"test", or "heldout": pairs of colour and kind never trained on'
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure parts again that the result file holds")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents that show the tables")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if options.controls is not None:
        options.controls = [name for name in options.controls.split(",") if name]
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    for document in options.into:
        try:
            split_at_marks(document)
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
    settings = run.settings()
    kept = kept_parts(run, settings)
    report: dict[str, Any] = {"settings": settings, "machine": machine()}
    report["parts"] = {name: part for name, (part, _) in kept.items()}
    report["commands"] = {name: command for name, (_, command) in kept.items()}
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/evaluate_toybox.py", *given])
    measure: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
        "tokenizer": tokenizer, "bits": bits, "control": control, "attributes": judged, "speed": speed,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        if name in report["parts"] and not options.again:
            continue
        started = time.perf_counter()
        report["parts"][name], report["commands"][name] = measure[name](run), command
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.sheets:
        sheets(run, options.sheets)
    text = table(report)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    for document in options.into:
        head, tail = split_at_marks(document)
        document.write_text(f"{head}{text}\n{tail}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
