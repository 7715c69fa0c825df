"""Makes the examples of the page from the built-in world: `python -m scaleweaver.demo.make_examples`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scaleweaver.controls.openpose import to_json
from scaleweaver.demo.scenes import SPLIT
from scaleweaver.toybox.dataset import draw_batch

FOLDER = Path(__file__).parent / "examples"
SIDE = 256
# scene of the test split -> the kind of control that is taken from it, and words for a picture of one's own
EXAMPLES: dict[str, tuple[int, str, str]] = {
    "Rocket": (19, "canny", "a large red rocket on grass at noon"),
    "Wave": (9, "pose", "a woman with brown hair in a green shirt and green trousers, waving, on sand at noon"),
    "House": (43, "depth", "a large glossy brown house on grass at sunset"),
    "Mushroom": (7, "palette", "a red mushroom on stone at dawn"),
    "Jump": (241, "pose", "a boy with brown hair in a blue shirt and blue trousers, jumping, on snow in the morning"),
}
# poses of the skeleton to start from, by the scenes whose only person takes them
POSES = {
    "waving": 9, "standing": 194, "arms up": 51, "star jump": 241, "jumping": 34, "walking": 197, "running": 192,
    "pointing": 216, "hands on hips": 28, "kneeling": 42, "sitting": 102, "dancing": 3, "bowing": 151,
}  # fmt: skip


def make_examples(folder: Path = FOLDER) -> None:
    """Write the pictures, examples.json and poses.json."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, Any]] = []
    batch = draw_batch(SPLIT, [scene for scene, _, _ in EXAMPLES.values()], size=SIDE)
    for (title, (_, kind, prompt)), pixels in zip(EXAMPLES.items(), batch.pixels, strict=True):
        file = f"{title.lower()}.png"
        Image.fromarray(pixels).quantize(128).save(folder / file, optimize=True)
        listed.append({"title": title, "kind": kind, "prompt": prompt, "file": file})
    people = draw_batch(SPLIT, POSES.values(), size=SIDE).keypoints  # of (1, 18, 3)
    for points in people:
        points[..., 2] = np.minimum(points[..., 2], 1)  # a hidden joint is as sure as a visible one
    poses = {name: to_json(points, (SIDE, SIDE)) for name, points in zip(POSES, people, strict=True)}
    for name, record in (("examples", listed), ("poses", poses)):
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_examples()
