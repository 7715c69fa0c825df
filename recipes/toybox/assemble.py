"""Puts the results of the recipes together as the built-in model: bf16 safetensors in the Hub layout.

python recipes/toybox/assemble.py --model runs/toybox/controls/result --control-guidance-scale 4 --temperature 0.5 \
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
    parser.add_argument("--model", type=Path, required=True, help="a whole pipeline, with controls or without")
    parser.add_argument("--control", type=Path, action="append", default=[], help="a control trained on its own")
    parser.add_argument("--out", type=Path, required=True, help="a model card that lies there is kept")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--control-guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    options = parser.parse_args()
    chosen = {
        name: getattr(options, name) for name in ("guidance_scale", "control_guidance_scale", "temperature", "top_p")
    }
    defaults = {name: value for name, value in chosen.items() if value is not None}
    pipe = VARControlPipeline.from_pretrained(options.model, **defaults).to(torch.bfloat16)
    for folder in options.control:
        pipe.load_control(folder)
    card = options.out / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    shutil.rmtree(options.out, ignore_errors=True)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path=options.out.name)  # not the folder of the run
    pipe.save_pretrained(options.out)
    if text is not None:
        card.write_text(text, encoding="utf-8")
    weights = sorted(options.out.rglob("*.safetensors"))
    for path in weights:
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(options.out)}")
    print(f"{sum(p.stat().st_size for p in weights) / 1e6:7.2f} MB  together")


if __name__ == "__main__":
    main()
