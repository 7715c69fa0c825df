"""The skeleton whose joints can be dragged: OpenPose JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from scaleweaver.controls.openpose import COCO_18, HUES, LIMBS

FOLDER = Path(__file__).parent
POSES = FOLDER.parent / "examples" / "poses.json"


@lru_cache(maxsize=1)
def poses() -> Mapping[str, Any]:
    """Name -> OpenPose JSON of the poses to start from."""
    return dict(json.loads(POSES.read_text(encoding="utf-8")))


def skeleton(height: int, width: int, **arguments: Any) -> gr.HTML:
    """A component whose value is OpenPose JSON as text; its event `input` tells that somebody moved a joint."""
    return gr.HTML(
        value=json.dumps(next(iter(poses().values()))),
        html_template=(FOLDER / "skeleton.html").read_text(encoding="utf-8"),
        js_on_load=(FOLDER / "skeleton.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **skeleton_properties(height, width),
        **arguments,
    )


def skeleton_properties(height: int, width: int) -> dict[str, Any]:
    """All properties of a skeleton: an update must name every one, as those of a pad."""
    return {
        "width": width,
        "height": height,
        "joints": list(COCO_18),
        "limbs": [list(limb) for limb in LIMBS],
        "colours": [f"rgb{hue}" for hue in HUES],
        "poses": poses(),
    }
