"""The command line of `scaleweaver.train.assembly`: a trained model put together as it ships, without a run of stages.

python recipes/toybox/assemble.py --model runs/toybox/controls/result --control-guidance-scale 4 --temperature 0.5 \
    --out scaleweaver/assets/toybox
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scaleweaver.train.assembly import assemble, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a whole pipeline, with controls or without")
    parser.add_argument("--control", type=Path, action="append", default=[], help="a control trained on its own")
    parser.add_argument("--out", type=Path, required=True, help="cards and pictures that lie there are kept")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--control-guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    options = parser.parse_args()
    chosen = {
        name: getattr(options, name) for name in ("guidance_scale", "control_guidance_scale", "temperature", "top_p")
    }
    defaults = {name: value for name, value in chosen.items() if value is not None}
    assemble(options.out, options.model, options.control, defaults)
    weights = sizes(options.out)
    for path, size in weights.items():
        print(f"{size / 1e6:7.2f} MB  {path}")
    print(f"{sum(weights.values()) / 1e6:7.2f} MB  together")


if __name__ == "__main__":
    main()
