"""The sketch pad: lines, depth in greys, colours, or a mask painted over a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from scaleweaver.demo.encoded import decode

FOLDER = Path(__file__).parent
MAX_SIDE = 1024
# kinds whose maps are drawn lines, and what the pad offers for the others
LINES = ("canny", "softedge", "lineart", "scribble", "lines")


def sketch_pad(height: int, width: int, mode: str = "lines", *, backdrop: str = "", **arguments: Any) -> gr.HTML:
    """A component whose value is a PNG as a data URL, empty while nothing is drawn; `input` tells that a stroke ended.

    mode: "lines", "depth", "colours" or "mask"; a mask is painted over `backdrop`, a data URL too.
    """
    return gr.HTML(
        value="",
        html_template=(FOLDER / "sketch.html").read_text(encoding="utf-8"),
        js_on_load=(FOLDER / "sketch.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **pad_properties(height, width, mode, backdrop),
        **arguments,
    )


def pad_properties(height: int, width: int, mode: str, backdrop: str = "") -> dict[str, Any]:
    """All properties of a pad: an update must name every one, for a pad in a folded part is made of the last update."""
    return {"height": height, "width": width, "mode": mode, "backdrop": backdrop}


def mode_of(kind: str) -> str:
    """What the pad offers for a kind of control."""
    return "lines" if kind in LINES else "depth" if kind == "depth" else "colours"


def read_sketch(value: str | None, name: str = "sketch") -> Image.Image | None:
    """What was drawn, as RGB; None for an empty pad."""
    return decode(value, name, most_pixels=MAX_SIDE**2) if value else None
