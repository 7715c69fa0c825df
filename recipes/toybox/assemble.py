"""Puts the results of the recipes together as the built-in model: bf16 safetensors in the Hub layout.

python recipes/toybox/assemble.py --backbone runs/toybox/backbone/result --control runs/toybox/canny/result/canny \
    --out scaleweaver/assets/toybox
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from scaleweaver import VARControlPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="result folder of the backbone recipe")
    parser.add_argument("--control", type=Path, action="append", default=[], help="result folder of a control recipe")
    parser.add_argument(
        "--card", type=Path, default=Path(__file__).with_name("card.md"), help="model card to ship, if there is one"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in ("guidance_scale", "temperature", "top_p")}
    defaults = {name: value for name, value in chosen.items() if value is not None}
    pipe = VARControlPipeline.from_pretrained(options.backbone, **defaults).to(torch.bfloat16)
    for folder in options.control:
        pipe.load_control(folder)
    shutil.rmtree(options.out, ignore_errors=True)
    pipe.save_pretrained(options.out)
    if options.card.is_file():
        shutil.copy(options.card, options.out / "README.md")
    weights = sorted(options.out.rglob("*.safetensors"))
    for path in weights:
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(options.out)}")
    print(f"{sum(p.stat().st_size for p in weights) / 1e6:7.2f} MB  together")


if __name__ == "__main__":
    main()
