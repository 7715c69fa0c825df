"""What narrower numbers cost in pictures and bring in time and memory: the built-in model, float32 and others.

Float32 draws each scene of the test split, every second one under its edges. The others are told the same codes scale
by scale (`forced`) with the same random numbers: how many bits would they have drawn alike, and how far apart are the
pictures decoded from those codes? Times are CPU seconds, the smallest of interleaved rounds.

python benchmarks/dtypes.py [--scenes 32] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from cpu_tables import write_into
from torch import Tensor

from scaleweaver import Control
from scaleweaver.controls import canny
from scaleweaver.evaluate.memory import nbytes
from scaleweaver.evaluate.speed import machine
from scaleweaver.images import to_pil
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleStep
from scaleweaver.toybox.dataset import ToyboxDataset

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "guides" / "speed.md"
FORMATS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float32, int8 weights": ("float32", "int8"),
    "bfloat16, int8 weights": ("bfloat16", "int8"),
}


@dataclass
class Listening:
    """A sampler that remembers what it drew, also where the loop is told other codes."""

    sampler: BitwiseSampler
    drawn: list[Tensor] = field(default_factory=list)

    def sample(self, logits: Tensor, step: ScaleStep, generators: Sequence[torch.Generator]) -> Tensor:
        self.drawn.append(self.sampler.sample(logits, step, generators))
        return self.drawn[-1]


@dataclass(frozen=True)
class Scene:
    """A call, and what float32 made of it."""

    prompt: str
    control: Control | None
    seed: int
    codes: list[Tensor]
    picture: Tensor


def load(name: str) -> VARControlPipeline:
    dtype, rounded = FORMATS[name]
    pipe = VARControlPipeline.from_pretrained("toybox", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe if rounded is None else pipe.quantize(rounded)


def draw(pipe: VARControlPipeline, prompt: str, control: Control | None, seed: int, **more: Any) -> Any:
    return pipe(prompt, control=control, seed=seed, output_type="pt", **more)


def scenes(pipe: VARControlPipeline, count: int) -> list[Scene]:
    found = []
    pictures = ToyboxDataset("test", count)
    for seed in range(count):
        sample = pictures[seed]
        edges = Control("canny", canny(to_pil(sample.image[None])[0])) if seed % 2 else None
        out = draw(pipe, sample.text, edges, seed)
        found.append(Scene(sample.text, edges, seed, out.codes, out.images))
    return found


def compare(pipe: VARControlPipeline, given: Sequence[Scene]) -> dict[str, float]:
    """Share of equal bits, and the mean peak signal-to-noise ratio in dB of pictures from the same codes."""
    equal = bits = 0
    ratios = []
    temperature, top_k, top_p = (pipe.config[name] for name in ("temperature", "top_k", "top_p"))
    for scene in given:
        listening = Listening(BitwiseSampler(temperature, top_k, top_p))
        out = draw(pipe, scene.prompt, scene.control, scene.seed, forced=scene.codes, sampler=listening)
        equal += sum(int((a == b).sum()) for a, b in zip(listening.drawn, scene.codes, strict=True))
        bits += sum(codes.numel() for codes in scene.codes)
        error = (out.images - scene.picture).square().mean().item()
        ratios.append(-10 * math.log10(error) if error else math.inf)
    return {"equal_bits": equal / bits, "psnr": sum(ratios) / len(ratios)}


def seconds(pipes: dict[str, VARControlPipeline], given: Sequence[Scene], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of a picture without and with a control."""
    best: dict[str, dict[str, float]] = {name: {} for name in pipes}
    for _ in range(rounds + 1):  # the first one warms up, and is never the smallest
        for name, pipe in pipes.items():
            for key, scene in (("plain", given[0]), ("controlled", given[1])):
                start = time.process_time()
                draw(pipe, scene.prompt, scene.control, scene.seed)
                best[name][key] = min(best[name].get(key, math.inf), time.process_time() - start)
    return best


def table(report: dict[str, Any]) -> str:
    lines = [
        "| format | equal bits | PSNR, dB | transformer, MB | CPU seconds | with edges |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["formats"].items():
        ratio = "the same" if row["psnr"] is None else f"{row['psnr']:.1f}"
        lines.append(
            f"| {name} | {row['equal_bits']:.2%} | {ratio} | {row['transformer_bytes'] / 1e6:.1f} | "
            f"{row['plain']:.3f} | {row['controlled']:.3f} |"
        )
    where = report["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{report['scenes']} scenes, {where['processor']}, {where['threads']} threads; `{report['command']}`.",
        ]
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write dtypes.json and dtypes.md there, not into the repository")
    arguments = parser.parse_args(given)
    if arguments.scenes < 2:
        parser.error("--scenes must be 2 or more: one without and one with a control")
    torch.set_num_threads(arguments.threads)
    names = [name for name, (_, rounded) in FORMATS.items() if rounded is None or find_spec("torchao")]
    pipes = {name: load(name) for name in names}
    drawn = scenes(pipes["float32"], arguments.scenes)
    times = seconds(pipes, drawn, arguments.rounds)
    formats = {}
    for name, pipe in pipes.items():
        found = compare(pipe, drawn)
        finite = {**found, "psnr": found["psnr"] if math.isfinite(found["psnr"]) else None}  # JSON knows no infinity
        formats[name] = {**finite, **times[name], "transformer_bytes": nbytes(pipe.transformer)}
    report = {
        "command": " ".join(["python", "benchmarks/dtypes.py", *(sys.argv[1:] if given is None else given)]),
        "machine": machine(), "scenes": arguments.scenes, "rounds": arguments.rounds, "formats": formats,
    }  # fmt: skip
    text = table(report)
    (arguments.out or RESULTS).mkdir(parents=True, exist_ok=True)
    result = (arguments.out or RESULTS) / "dtypes.json"
    result.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.out:
        (arguments.out / "dtypes.md").write_text(text + "\n", encoding="utf-8")
    else:
        write_into(PAGE, "dtypes", text)
    print(text)


if __name__ == "__main__":
    main()
