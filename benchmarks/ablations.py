"""Which parts of ScaleWeaver's block matter? One canny adapter a variant, trained alike on a frozen backbone.

python benchmarks/ablations.py --model BUILT_IN_BEFORE --into docs/ablations.md
python benchmarks/ablations.py --only "as recommended,joint softmax" --set steps=400

The questions are those that public reviews put to the paper (arXiv 2510.14882): separate or joint softmax, which scales
the image reads, which blocks, rank, zero start, text in the condition stream. Every variant has the same pictures,
steps and seeds. Runs are resumable, and a finished variant is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from proof.documents import split_at_marks
from torch.utils.flop_counter import FlopCounterMode

from scaleweaver import Control, VARControlPipeline
from scaleweaver.adapters import trainable_parameters
from scaleweaver.controls import canny
from scaleweaver.doctor import processor
from scaleweaver.evaluate.attributes import AttributeJudge, score
from scaleweaver.evaluate.control import canny_f1
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.evaluate.report import machine
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.scene import attributes
from scaleweaver.train.config import TrainConfig
from scaleweaver.train.control import ControlRecipe
from scaleweaver.train.data import Pixels, fingerprint
from scaleweaver.train.trainer import train

RECIPE = Path(__file__).parents[1] / "recipes" / "toybox" / "ablation.yaml"
RESULT = Path(__file__).parent / "results" / "ablations.json"

# name -> what differs from the recipe's adapter
VARIANTS: dict[str, dict[str, Any]] = {
    "as recommended": {},
    "joint softmax": {"fusion": "joint"},
    "causal scope": {"scope": "causal"},
    "last half of the blocks": {"inject_blocks": [4, 5, 6]},
    "every other block": {"inject_blocks": [0, 2, 4, 6]},
    "all blocks": {"inject_blocks": [0, 1, 2, 3, 4, 5, 6]},
    "rank 4": {"lora_rank": 4},
    "rank 64": {"lora_rank": 64},
    "random projection": {"z_init": "normal"},
    "projection after the gate": {"z_position": "after_gate"},
    "text in the condition stream": {"condition_modulation": "text"},
    "no penalty of distance": {"locality": None},
}


class Scenes:
    """Test scenes, their prompts and edges, shared by all variants."""

    def __init__(self, count: int) -> None:
        batch = draw_batch("test", range(count), size=128)
        self.prompts = [explicit_caption(scene) for scene in batch.scenes]
        self.asked = [attributes(scene) for scene in batch.scenes]
        self.edges = [canny(picture) for picture in batch.pixels]

    @cached_property
    def judge(self) -> AttributeJudge:
        return AttributeJudge.built_in().eval()

    def scores(self, pictures: Pixels) -> dict[str, float]:
        """Canny F1 within one pixel, and the share of things that the judge finds, with standard errors."""
        f1 = [canny_f1(p, np.asarray(edges))["f1_1px"] for p, edges in zip(pictures, self.edges, strict=True)]
        judged = zip(self.judge.judge(pictures), self.asked, strict=True)
        kinds = [score([found], [asked])["kind"] for found, asked in judged]
        return {**_mean("f1_1px", f1), **_mean("kind", kinds)}


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(values)), f"{name}_error": float(np.std(values) / len(values) ** 0.5)}


def measure(values: Mapping[str, Any], changes: Mapping[str, Any], name: str, scenes: Scenes) -> dict[str, Any]:
    """Train one variant and measure it."""
    folder = folder_of(values, name)
    settings = {**values, "out": str(folder), "adapter": {**values["adapter"], **changes}}
    settings["latents"] = str(Path(values["out"]) / "latents")  # the same for all
    config = TrainConfig.from_mapping(settings)
    recipe = ControlRecipe(config)
    start = recipe.validate(folder / "samples", 0)
    started = time.perf_counter()
    train(recipe, config)
    seconds = time.perf_counter() - started
    pipe = VARControlPipeline.from_pretrained(values["model"])
    pipe.set_progress_bar_config(disable=True)
    pipe.unload_control("canny")
    pipe.load_control(folder / "result" / "canny")
    end = json_metrics(folder)
    pictures = []
    for first in range(0, len(scenes.prompts), 16):
        some = slice(first, first + 16)
        control = Control("canny", scenes.edges[some])
        seeds = list(range(first, first + len(scenes.edges[some])))
        pictures.append(pipe(scenes.prompts[some], control=control, seed=seeds, output_type="np").images)
    found = scenes.scores((np.concatenate(pictures) * 255).round().astype(np.uint8))
    trained = trainable_parameters(pipe.transformer, pipe.controls["canny"], "canny")
    return {
        "parameters": sum(p.numel() for p in trained.values()),
        "loss_without": end["val_loss_without"],
        "gain_at_start": start["gain_canny"],
        "gain": end["val_gain_canny"],
        **found,
        **work(pipe, scenes),
        "training_seconds": seconds,
    }


def json_metrics(folder: Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()[1:]
    return {name: float(value) for _, name, value in (line.split(",") for line in lines)}


@torch.no_grad()
def work(pipe: VARControlPipeline, scenes: Scenes) -> dict[str, float]:
    """Floating-point operations of one picture with its control encoded anew, and of the encoding alone."""
    with FlopCounterMode(display=False) as drawing:
        pipe(scenes.prompts[0], control={"canny": scenes.edges[0]}, seed=0)
    result = {"gflop": drawing.get_total_flops() / 1e9}
    if pipe.controls["canny"].config.condition_modulation == "null":  # with text there is nothing to encode ahead
        with FlopCounterMode(display=False) as encoding:
            pipe.encode_control(scenes.edges[0], "canny")
        result["gflop_encoding"] = encoding.get_total_flops() / 1e9
    return result


def times(values: Mapping[str, Any], names: Sequence[str], scenes: Scenes, repeats: int = 12) -> dict[str, Any]:
    """Seconds per picture of all variants, in turns, so that a busy moment does not meet one of them alone."""
    pipe = VARControlPipeline.from_pretrained(values["model"])
    pipe.set_progress_bar_config(disable=True)
    for name in list(pipe.controls):
        pipe.unload_control(name)
    for name in names:
        pipe.load_control(folder_of(values, name) / "result" / "canny", slug(name))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats + 1):
        for name in names:
            started = time.perf_counter()
            pipe(scenes.prompts[i % len(scenes.prompts)], control={slug(name): scenes.edges[0]}, seed=i)
            seconds[name].append(time.perf_counter() - started)
    load = os.getloadavg()[0]
    return {"threads": torch.get_num_threads(), "load": load} | {
        n: statistics.median(s[1:]) for n, s in seconds.items()
    }


def slug(name: str) -> str:
    return name.replace(" ", "-")


def folder_of(values: Mapping[str, Any], name: str) -> Path:
    """Where a variant is trained."""
    return Path(values["out"]) / slug(name)


def table(report: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings = report["settings"]
    lines = [
        f"{settings['steps']} steps of {settings['batch']} pictures each; {settings['count']} scenes of the test split;"
        f" backbone {settings['backbone']}; {settings['processor']}, torch {report['machine']['versions']['torch']},"
        f" times with {report['times']['threads']} threads",
        "",
        f"```bash\n{report['command']}\n```",
        "",
        "| variant | trained | loss gained, nats a bit x 1000 | F1, 1 px | things found | GFLOP a picture | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["variants"].items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {1000 * row['gain']:+.1f}"
            f" | {row['f1_1px']:.3f} ± {row['f1_1px_error']:.3f} | {row['kind']:.2f} ± {row['kind_error']:.2f}"
            f" | {row['gflop']:.2f} | {1000 * report['times'][name]:.0f} |"
        )
    base = report["without"]
    lines.append(
        f"| no control | - | 0 | {base['f1_1px']:.3f} ± {base['f1_1px_error']:.3f}"
        f" | {base['kind']:.2f} ± {base['kind_error']:.2f} | - | - |"
    )
    return "\n".join(lines) + "\n"


def without(values: Mapping[str, Any], scenes: Scenes) -> dict[str, float]:
    """The same prompts and seeds with no control."""
    pipe = VARControlPipeline.from_pretrained(values["model"])
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(scenes.prompts, seed=list(range(len(scenes.prompts))), output_type="np").images
    return scenes.scores((drawn * 255).round().astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--model", help="in place of the recipe's")
    parser.add_argument("--only", help=f"some variants, comma-separated, of: {', '.join(VARIANTS)}")
    parser.add_argument("--count", type=int, default=64, help="test scenes")
    parser.add_argument("--train-only", action="store_true", help="leave the times and the table for a later call")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents that show the table")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    values = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    values |= {key: yaml.safe_load(value) for key, _, value in (entry.partition("=") for entry in options.set)}
    values["model"] = options.model or values["model"]
    wanted = options.only.split(",") if options.only else list(VARIANTS)
    if unknown := sorted(set(wanted) - set(VARIANTS)):
        parser.error(f"unknown variants {', '.join(unknown)}; there is {', '.join(VARIANTS)}")
    transformer = VARControlPipeline.from_pretrained(values["model"]).transformer
    settings = {name: values[name] for name in ("steps", "batch", "lr", "adapter")}
    settings |= {"count": options.count, "backbone": fingerprint(transformer), "processor": processor()}
    report: dict[str, Any] = {"settings": settings, "machine": machine(), "variants": {}}
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            raise ValueError(f"{options.out} holds numbers of other settings; pass another --out, or delete it")
        report = before
    given = sys.argv[1:] if arguments is None else arguments
    report["command"] = shlex.join(["python", "benchmarks/ablations.py", *given])
    scenes = Scenes(options.count)
    report["without"] = report.get("without") or without(values, scenes)
    for name in wanted:
        if name not in report["variants"]:
            report["variants"][name] = measure(values, VARIANTS[name], name, scenes)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {report['variants'][name]}", file=sys.stderr)
    report["variants"] = {name: report["variants"][name] for name in VARIANTS if name in report["variants"]}
    if options.train_only:
        return
    report["times"] = times(values, list(report["variants"]), scenes)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for document in options.into:
        head, tail = split_at_marks(document)
        document.write_text(f"{head}{table(report)}\n{tail}", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
