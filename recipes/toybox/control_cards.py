"""Model cards of the built-in controls: what was measured, pictures under the first maps of the test split, limits.

python recipes/toybox/control_cards.py --model scaleweaver/assets/toybox

Numbers and sheets are what benchmarks/evaluate_toybox.py wrote with --sheets FOLDER_OF_THE_MODEL; a control whose
weights it did not measure is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from scaleweaver import VARControlPipeline
from scaleweaver.adapters import trainable_parameters
from scaleweaver.evaluate.report import markdown
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.train.data import fingerprint

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "toybox.json"
CARD = Path(__file__).parent / "control_card.md"
SHEET = "sheet.jpg"  # beside each card

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
    half_way = part["half way"]
    blocks = config.inject_blocks or ()
    return Template(CARD.read_text(encoding="utf-8")).substitute(
        kind=kind,
        what=WHAT[kind],
        making=MAKING[kind],
        limits=LIMITS[kind],
        prompt=PERSON if kind == "pose" else "a large red rocket on grass at noon",
        sheet=SHEET,
        which="The first scenes of the test split" + (" with somebody in them" if kind == "pose" else ""),
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
        half="-" if half_way["share"] is None else f"{half_way['share']:.2f}",
        blazepose=blazepose(report) if kind == "pose" else "",
        command=report["commands"]["control"],
        machine=f"{settings['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}",
    )


def blazepose(report: Mapping[str, Any]) -> str:
    """What a network that knows nothing of this world finds of the poses, where it was asked."""
    part = report["parts"].get("blazepose")
    if part is None:
        return ""
    return f"""
By {part["meter"]}, which was trained on photos and cannot tell front from back where there is no face; "either side"
counts left and right as they fit better:

{markdown(part)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    report = json.loads(options.results.read_text(encoding="utf-8"))
    pipe = VARControlPipeline.from_pretrained(options.model)
    for kind, adapter in pipe.controls.items():
        if report["settings"]["weights"].get(kind) != fingerprint(adapter):
            raise ValueError(f"{options.results} holds no numbers of these weights of {kind}; run evaluate_toybox.py")
        folder = options.model / "controls" / kind
        if not (folder / SHEET).is_file():
            raise ValueError(f"{folder} has no {SHEET}; run evaluate_toybox.py with --sheets {options.model}")
        parameters = sum(p.numel() for p in trainable_parameters(pipe.transformer, adapter, kind).values())
        text = card(kind, adapter.config, parameters, report)
        (folder / "README.md").write_text(text, encoding="utf-8")
        print(folder)


if __name__ == "__main__":
    main()
