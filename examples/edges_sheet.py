"""The first scenes of the built-in world's test split: their edges, what the model draws from them, the renders.

python examples/edges_sheet.py --count 24
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from scaleweaver import VARControlPipeline
from scaleweaver.controls import canny
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.toybox.dataset import draw_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/edges_sheet.png"))
    options = parser.parse_args()

    batch = draw_batch("test", range(options.count), size=128)
    renders = [Image.fromarray(p) for p in batch.pixels]
    edges = [canny(render) for render in renders]
    prompts = [explicit_caption(scene) for scene in batch.scenes]
    seeds = [options.seed + i for i in range(options.count)]
    pipe = VARControlPipeline.from_pretrained("toybox")
    drawn = pipe(prompts, control={"canny": edges}, seed=seeds).images

    rows = [
        np.concatenate([np.asarray(image.convert("RGB")) for image in row], axis=1) for row in (edges, drawn, renders)
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(options.out)
    print(options.out)
    for prompt in prompts:
        print(f"  {prompt}")


if __name__ == "__main__":
    main()
