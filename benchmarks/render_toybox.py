"""How fast the toy world is rendered on one thread: 128 pixels, 4 samples a pixel, batches of 16, captions included.

python benchmarks/render_toybox.py [--count 64] [--world 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from scaleweaver.doctor import processor
from scaleweaver.toybox.dataset import ToyboxBatches

SIZE, SUPERSAMPLE, BATCH = 128, 2, 16
PACKAGES = ("scaleweaver", "torch", "numpy")
RESULT = Path(__file__).parent / "results" / "render_toybox.json"


def batches(start: int, count: int, world: int) -> ToyboxBatches:
    return ToyboxBatches(
        "test", BATCH, start=start, count=count, size=SIZE, supersample=SUPERSAMPLE, workers=0, version=world
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="pictures to render")
    parser.add_argument("--world", type=int, default=1, help="version of the world")
    options = parser.parse_args()
    count, world = options.count, options.world
    torch.set_num_threads(1)

    for _ in batches(count, BATCH, world):  # imports, tables that are built once
        pass
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in batches(0, count, world):
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "threads": 1, "size": SIZE, "supersample": SUPERSAMPLE, "batch": BATCH, "world": world, "pictures": count,
        "runs": 1,
        "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3),
        # other load on the machine lowers the first number only
        "pictures_per_second": round(count / wall, 2), "pictures_per_cpu_second": round(count / cpu, 2),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    file = RESULT if world == 1 else RESULT.with_stem(f"{RESULT.stem}_world{world}")
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    print(f"{processor()}, 1 thread, {SIZE}x{SIZE}, {SUPERSAMPLE**2} samples a pixel, batches of {BATCH}, one run")
    print()
    print("| world | pictures | seconds | CPU seconds | pictures per second | pictures per CPU second |")
    print("|---|---|---|---|---|---|")
    print(f"| {world} | {count} | {wall:.2f} | {cpu:.2f} | {count / wall:.1f} | {count / cpu:.1f} |")


if __name__ == "__main__":
    main()
