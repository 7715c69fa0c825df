"""What each control does: the first scenes of the built-in world's test split, map above, picture drawn under it below.

python examples/control_sheet.py --out docs/images/controls-toybox.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from scaleweaver import Control, VARControlPipeline
from scaleweaver.evaluate.examples import ToyboxExamples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="scenes for each control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/control_sheet.png"))
    options = parser.parse_args()

    pipe = VARControlPipeline.from_pretrained("toybox")
    blocks = []
    for number, kind in enumerate(pipe.available_controls):
        # pose: the first scenes with somebody in them; the others show different scenes, not the same ones again
        first = 0 if kind == "pose" else number * options.count
        examples = ToyboxExamples("test", [kind]).read(range(first, first + options.count))
        maps = [example.maps[kind] for example in examples]
        seeds = [options.seed + example.number for example in examples]
        drawn = pipe([example.prompt for example in examples], control=Control(kind, maps), seed=seeds).images
        rows = [np.concatenate(maps, axis=1), np.concatenate([np.asarray(image) for image in drawn], axis=1)]
        blocks.append(np.concatenate(rows))  # (2 * 128, count * 128, 3)
    left, right = (np.concatenate(part) for part in (blocks[::2], blocks[1::2]))
    gap = np.full((len(left), 12, 3), 255, np.uint8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([left, gap, right], axis=1)).save(options.out, optimize=True)
    print(f"{options.out}: {', '.join(pipe.available_controls)}, row by row")


if __name__ == "__main__":
    main()
