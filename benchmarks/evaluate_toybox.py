"""How good is the built-in model? Measured on scenes of the test split, which no training saw.

python benchmarks/evaluate_toybox.py --judge runs/toybox/judge/result/judge --sheets out/sheets \
    --into README.md --into scaleweaver/assets/toybox/README.md
python benchmarks/evaluate_toybox.py --parts speed --threads 1 --out out/speed.json

Prompts are `explicit_caption`s: they say everything that is asked of the pictures afterwards. Every number has its
bounds beside it: the tokenizer's own reconstruction above, unrelated pairs below. Each part is written as soon as it is
measured; a later call with the same settings goes on with the missing parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from scaleweaver import VARControlPipeline, __version__
from scaleweaver.cache import KVCache
from scaleweaver.controls import canny
from scaleweaver.doctor import processor
from scaleweaver.evaluate.attributes import AttributeJudge, Judgement, score
from scaleweaver.evaluate.control import canny_f1
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.reference import ReferenceInjector
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.scene import attributes
from scaleweaver.train.data import Pixels, fingerprint, save_grid, to_images
from scaleweaver.train.losses import bit_loss
from scaleweaver.train.tokenizer import reconstruct, reconstruction_scores

RESULT = Path(__file__).parent / "results" / "toybox.json"
PARTS = ("tokenizer", "bits", "control", "attributes", "speed")
EDGES = ("f1", "f1_1px", "f1_2px")
SHOWN = 48  # prompts on the contact sheet
START, END = "<!-- measured -->\n", "<!-- /measured -->"  # where the tables stand in a document


class Evaluation:
    """The model, the test scenes, and pictures drawn once and shared by the parts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipe = VARControlPipeline.from_pretrained(options.model)
        self.pipe.set_progress_bar_config(disable=True)
        if options.control and options.control not in self.pipe.available_controls:
            raise ValueError(f'{options.model} has no control "{options.control}"; pass --control ""')
        self.schedule = ScaleSchedule.from_dict(self.pipe.config["schedule"])
        batch = draw_batch(options.split, range(options.count), size=self.schedule.height)
        self.scenes, self.captions = batch.scenes, batch.texts
        self.references: Pixels = batch.pixels  # (B, H, W, 3)
        self.edges = [canny(picture) for picture in self.references]
        self.prompts = [explicit_caption(scene) for scene in self.scenes]
        self.asked = [attributes(scene) for scene in self.scenes]
        self.seeds = [options.seed + i for i in range(options.count)]
        self._drawn: dict[float, Pixels] = {}

    @cached_property
    def judge(self) -> AttributeJudge:
        return AttributeJudge.from_pretrained(self.options.judge).eval()

    @cached_property
    def reconstructed(self) -> Pixels:
        return reconstruct(self.pipe.vae, self.references, self.schedule)

    def drawn(self, strength: float) -> Pixels:
        """A picture per prompt with the edges of its own scene at this strength; 0 is no control at all."""
        if strength not in self._drawn:
            self._drawn[strength] = self.draw(range(len(self.prompts)), strength or None)
        return self._drawn[strength]

    def draw(self, rows: Sequence[int], strength: float | None) -> Pixels:
        from scaleweaver import Control

        parts = []
        for start in range(0, len(rows), self.options.batch):
            some = rows[start : start + self.options.batch]
            control = None
            if strength is not None:
                control = Control(self.options.control, [self.edges[i] for i in some], scale=strength)
            prompts, seeds = [self.prompts[i] for i in some], [self.seeds[i] for i in some]
            images = self.pipe(prompts, control=control, seed=seeds, output_type="np").images
            parts.append((images * 255).round().astype(np.uint8))
        return np.concatenate(parts)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on; results of other settings are not mixed with these."""
        networks = {name: getattr(self.pipe, name) for name in ("transformer", "text_encoder", "vae")}
        weights = {name: fingerprint(network) for name, network in (networks | self.pipe.controls).items()}
        numbers = ("guidance_scale", "control_guidance_scale", "temperature", "top_k", "top_p")
        calls = {name: self.pipe.config.get(name) for name in numbers}
        names = ("split", "count", "seed", "control")
        sources = {"weights": weights, "processor": processor()}
        return sources | {n: getattr(self.options, n) for n in names} | calls


def tokenizer(run: Evaluation) -> dict[str, Any]:
    """PSNR and edges of reconstructions: what a perfect transformer could reach."""
    return reconstruction_scores(run.reconstructed, run.references)


@torch.inference_mode()
def bits(run: Evaluation) -> dict[str, Any]:
    """Share of right bits per scale given all coarser ones, without noise; the captions are those of training."""
    pipe, schedule = run.pipe, run.schedule
    adapter = pipe.controls.get(run.options.control)
    # an adapter that also reads the prompt has no bank of its own
    alone = adapter is not None and adapter.config.condition_modulation == "null"
    conditions = ["caption", "empty prompt", *(["caption and control"] if alone else [])]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in conditions}
    for start in range(0, len(run.prompts), run.options.batch):
        some = slice(start, start + run.options.batch)
        latent = pipe.vae.encode(to_images(run.references[some]))
        inputs, labels, _ = pipe.vae.target.labels(latent, schedule)
        for name in conditions:
            texts = run.captions[some] if name != "empty prompt" else [""] * len(latent)
            context = pipe.transformer.encode_text(pipe.encode_prompt(texts))
            injectors = []
            if name == "caption and control":
                bank = pipe.encode_control(run.edges[some], run.options.control).bank
                injectors = [ReferenceInjector(bank, adapter, [1.0] * len(schedule), images=len(latent))]
            logits = pipe.transformer(inputs, schedule.steps, context, KVCache(), injectors=injectors)
            rows[name].append(bit_loss(logits, labels, schedule)[2] * len(latent))  # (S,)
    count = len(run.prompts)
    return {name: [round(v, 4) for v in (torch.stack(r).sum(0) / count).tolist()] for name, r in rows.items()}


def control(run: Evaluation) -> dict[str, Any]:
    """Canny F1 of pictures against the edges they were given, and the same pictures against other scenes' edges."""
    if not run.options.control:
        return {}
    others = [*run.edges[1:], run.edges[0]]
    result = {f"strength {s}": edge_scores(run.drawn(s), run.edges) for s in (1.0, 0.5)}
    result["without control"] = edge_scores(run.drawn(0.0), run.edges)
    result["shuffled edges"] = edge_scores(run.drawn(1.0), others)
    result["reconstructed reference"] = edge_scores(run.reconstructed, run.edges)
    some = range(min(4, len(run.prompts)))
    same = np.array_equal(run.draw(some, 0.0), run.drawn(0.0)[: len(some)])
    return result | {"strength 0 equals no control": same}


def edge_scores(pictures: Pixels, edges: Sequence[Any]) -> dict[str, float]:
    """Mean and standard error of each F1."""
    rows = [canny_f1(picture, np.asarray(edge)) for picture, edge in zip(pictures, edges, strict=True)]
    scores: dict[str, float] = {}
    for name in EDGES:
        values = np.array([row[name] for row in rows])
        scores |= {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}
    return scores


def judged(run: Evaluation) -> dict[str, Any]:
    """What the prompts asked for and the judge found; its own mistakes show on the true renders."""
    free = run.judge.judge(run.drawn(0.0))
    found: dict[str, list[Judgement]] = {
        "true renders": run.judge.judge(run.references),
        "tokenizer reconstructions": run.judge.judge(run.reconstructed),
        "prompt alone": free,
    }
    if run.options.control:
        found["prompt and edges"] = run.judge.judge(run.drawn(1.0))
    result = {name: score(judgements, run.asked) for name, judgements in found.items()}
    result["other prompts"] = score(free, [*run.asked[1:], run.asked[0]])
    return result | {"judge": fingerprint(run.judge)}


def speed(run: Evaluation) -> dict[str, Any]:
    """Seconds per picture, one at a time, after a warm-up; the median of several."""
    pipe, name = run.pipe, run.options.control
    calls: dict[str, Callable[[int], Any]] = {"prompt": lambda i: pipe(run.prompts[i], seed=i)}
    if name:
        encoded = pipe.encode_control(run.edges[0], name)
        calls["prompt and edges"] = lambda i: pipe(run.prompts[i], control={name: run.edges[i]}, seed=i)
        calls["prompt and encoded edges"] = lambda i: pipe(run.prompts[i], control={name: encoded}, seed=i)
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
    if 0.0 in run._drawn:
        save_grid(folder / "prompts.png", run.drawn(0.0)[:shown], columns=8)
        lines = [f"{i // 8 + 1}.{i % 8 + 1} {prompt}" for i, prompt in enumerate(run.prompts[:shown])]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if 1.0 in run._drawn:
        edges = np.stack([np.asarray(edge) for edge in run.edges[:24]])
        triples = _columns(edges, run.drawn(1.0)[:24], run.references[:24])
        save_grid(folder / "control.png", triples, columns=8)  # edges over result over reference


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
    if found.get("control"):
        lines += ["| edges of the picture against those given | F1 | F1, 1 px | F1, 2 px |", "|---|---|---|---|"]
        named = {name: values for name, values in found["control"].items() if isinstance(values, dict)}
        lines += [f"| {name} | " + _row(values[e] for e in EDGES) for name, values in named.items()] + [""]
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
    if options.judge and parts.get("attributes", {}).get("judge") != fingerprint(run.judge):
        parts.pop("attributes", None)
    return {name: (value, before["commands"][name]) for name, value in parts.items()}


def machine() -> dict[str, Any]:
    """Where the numbers were measured."""
    versions = {"scaleweaver": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    return {"cores": os.cpu_count(), "system": platform.platform(terse=True), "versions": versions}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="the built-in model, a folder or a Hub repository")
    parser.add_argument("--judge", type=Path, help="folder of a trained AttributeJudge (recipes/toybox/judge.yaml)")
    parser.add_argument("--control", default="canny", help='name of the edge control, "" for a model without one')
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
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if "attributes" in options.parts and options.judge is None:
        parser.error("the part attributes needs --judge; train one with `scaleweaver train recipes/toybox/judge.yaml`")
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
