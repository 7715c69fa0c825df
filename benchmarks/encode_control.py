"""What encoding a control image once saves: median seconds a picture with the image and with its `encode_control`.

Within one call the condition stream runs once for all pictures anyway, so the saving is largest where every picture is
a call of its own: a new prompt, a new seed, another strength under one control image. Prompts are encoded before, and
both ways are timed in turn, after a warm-up. The model "toybox" is the built-in one, with its own guidance; "125M" has
the published sizes of the smallest Infinity, random weights and random controls, and pictures of 256x256.

python benchmarks/encode_control.py [--models toybox 125M] [--pictures 1 4 16] [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from infinity_125m_cpu import PACKAGES, PROMPT, build
from PIL import Image

from scaleweaver.adapters import add_control
from scaleweaver.doctor import processor
from scaleweaver.hub import built_in_folder
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.pipeline import VARControlPipeline

RESULT = Path(__file__).parent / "results" / "encode_control.json"


def toybox() -> VARControlPipeline:
    """The built-in model with two controls; canny stands for both where it has no other, at the same cost."""
    pipe = VARControlPipeline.from_pretrained("toybox")
    if len(pipe.controls) < 2:
        pipe.load_control(built_in_folder("toybox") / "controls" / "canny", "again")
    return pipe


def random_125m() -> VARControlPipeline:
    """The 125M architecture with two untrained controls of the default form."""
    pipe = build()
    for name in ("canny", "depth"):
        pipe.controls[name] = add_control(pipe.transformer, ScaleWeaverConfig(kind=name), name)
    return pipe


MODELS: dict[str, Callable[[], VARControlPipeline]] = {"toybox": toybox, "125M": random_125m}


def lines(height: int, width: int, seed: int) -> Image.Image:
    """White squares in outline on black: what is drawn changes no cost."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width), np.uint8)
    for _ in range(5):
        top, left, size = (int(rng.integers(1, side // 2)) for side in (height, width, min(height, width)))
        picture[top : top + size, left : left + size] = 255
        picture[top + 1 : top + size - 1, left + 1 : left + size - 1] = 0
    return Image.fromarray(picture)


def measure(pipe: VARControlPipeline, pictures: int, names: list[str], repeats: int) -> dict[str, Any]:
    """Medians of one case, in seconds."""
    plan = pipe._plan(None, None, None, None)
    maps = {name: lines(plan.height, plan.width, seed) for seed, name in enumerate(names)}
    prompt = pipe.encode_prompt(PROMPT)

    def encode() -> dict[str, Any]:
        return {name: pipe.encode_control(image, name) for name, image in maps.items()}

    encoded = encode()
    ways: dict[str, Callable[[int], Any]] = {
        "encoding": lambda seed: encode(),
        "fresh": lambda seed: pipe(prompt_embeds=prompt, control=maps, seed=seed, num_images_per_prompt=pictures),
        "reused": lambda seed: pipe(prompt_embeds=prompt, control=encoded, seed=seed, num_images_per_prompt=pictures),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run(repeat)
            if repeat:  # the first is the warm-up
                seconds[way].append(time.perf_counter() - started)
    fresh, reused = (median(seconds[way]) / pictures for way in ("fresh", "reused"))
    return {
        "controls": len(names), "pictures": pictures, "repeats": repeats,
        "encoding_seconds": round(median(seconds["encoding"]), 4),
        "fresh_seconds_per_picture": round(fresh, 4), "reused_seconds_per_picture": round(reused, 4),
        "saved": round(1 - reused / fresh, 3),
    }  # fmt: skip


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        "| model | controls | pictures a call | encoding, s | fresh, s a picture | reused, s a picture | saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, cases in results.items():
        for case in cases:
            numbers = (case["encoding_seconds"], case["fresh_seconds_per_picture"], case["reused_seconds_per_picture"])
            cells = [model, case["controls"], case["pictures"], *(f"{x:.3f}" for x in numbers), f"{case['saved']:.0%}"]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["toybox"])
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    results: dict[str, list[dict[str, Any]]] = {}
    for model in arguments.models:
        pipe = MODELS[model]()
        pipe.set_progress_bar_config(disable=True)
        two = list(pipe.controls)[:2]
        results[model] = [
            measure(pipe, pictures, names, arguments.repeats)
            for names in (two[:1], two)
            for pictures in arguments.pictures
        ]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "threads": arguments.threads, "dtype": "float32", "results": results,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{processor()}, {arguments.threads} threads, float32, medians of {arguments.repeats}")
    print()
    print(table(results))


if __name__ == "__main__":
    main()
