"""Model cards of the built-in controls: what was measured, pictures under the first maps of the test split, limits.

python recipes/toybox/control_cards.py --model scaleweaver/assets/toybox

The numbers are read from what benchmarks/evaluate_toybox.py wrote; a control whose weights it did not measure is
refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from scaleweaver import Control, VARControlPipeline
from scaleweaver.adapters import trainable_parameters
from scaleweaver.evaluate.examples import ToyboxExamples
from scaleweaver.evaluate.report import markdown
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.train.data import Pixels, fingerprint, save_grid

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "toybox.json"
CARD = Path(__file__).parent / "control_card.md"
SHOWN = 8  # pictures on a card's sheet, none chosen

WHAT = {
    "canny": "Edges: what lies where, line by line.",
    "depth": "Depth: shapes and their distances; near is bright, the sky black.",
    "pose": "The pose of a person, as an OpenPose skeleton in COCO-18 order on black.",
    "palette": "Colours: the mean colour of every cell of an 8 x 8 grid.",
}
MAKING = {
    "canny": "control = canny(picture)  # thresholds 100 and 200",
    "depth": 'control = depth(picture, model="toybox")  # of a toybox picture; of anything else: any depth map',
    "pose": 'control = pose(picture, model="toybox")  # a toybox picture with a person; a photo: pose(picture)',
    "palette": "control = palette(picture)",
}
PERSON = "a woman with brown hair in a red shirt and blue trousers, waving, on grass at noon"
LIMITS = {
    "canny": "Large outlines are followed; thin and crowded lines are not. Edges do not say which colour goes where.",
    "depth": "Thin parts are lost. Depth says little about what a thing is: say it in the prompt.",
    "pose": "One person. Fingers and faces are smears, and arms in front of the body melt into it.",
    "palette": "Colours are right in the large; the grid is as coarse as the tokens, so it says nothing of shapes.",
}


def card(kind: str, config: ScaleWeaverConfig, parameters: int, report: Mapping[str, Any]) -> str:
    """README.md of one control."""
    settings, machine, part = report["settings"], report["machine"], report["parts"]["control"][kind]
    blocks = config.inject_blocks or ()
    return Template(CARD.read_text(encoding="utf-8")).substitute(
        kind=kind,
        what=WHAT[kind],
        making=MAKING[kind],
        limits=LIMITS[kind],
        prompt=PERSON if kind == "pose" else "a large red rocket on grass at noon",
        shown=SHOWN,
        size=f"{parameters / 1e6:.2f}",
        rank=config.lora_rank,
        first=blocks[0],
        last=blocks[-1],
        detector=config.detector,
        resolution=config.resolution,
        split=settings["split"],
        scenes=f"{settings['count']} scenes" + (", those with people" if kind == "pose" else ""),
        meter=part["meter"],
        table=markdown(part),
        command=report["commands"]["control"],
        machine=f"{settings['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}",
    )


def sheet(pipe: VARControlPipeline, kind: str, path: Path) -> None:
    """The first scenes of the test split that have such a map: map, picture, reference."""
    examples = list(ToyboxExamples("test", [kind], size=128, people=kind == "pose").read(range(SHOWN)))
    maps = [np.asarray(example.maps[kind]) for example in examples]
    prompts = [example.prompt for example in examples]
    images = pipe(prompts, control=Control(kind, maps), seed=list(range(len(prompts))), output_type="np").images
    drawn: Pixels = (images * 255).round().astype(np.uint8)
    rows = np.stack([np.concatenate([m, d, e.reference]) for m, d, e in zip(maps, drawn, examples, strict=True)])
    save_grid(path, rows, columns=SHOWN)
    # a card is read in a browser: 256 colours are enough
    Image.open(path).quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    report = json.loads(options.results.read_text(encoding="utf-8"))
    pipe = VARControlPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    for kind, adapter in pipe.controls.items():
        if report["settings"]["weights"].get(kind) != fingerprint(adapter):
            raise ValueError(f"{options.results} holds no numbers of these weights of {kind}; run evaluate_toybox.py")
        folder = options.model / "controls" / kind
        sheet(pipe, kind, folder / "sheet.png")
        parameters = sum(p.numel() for p in trainable_parameters(pipe.transformer, adapter, kind).values())
        text = card(kind, adapter.config, parameters, report)
        (folder / "README.md").write_text(text, encoding="utf-8")
        print(folder)


if __name__ == "__main__":
    main()
