"""gradio's picture, of which no visitor ever reads half.

gradio lays a picture down under a name made of its content, and writes it there again when it is shown again: whoever
reads an equal one at that moment gets a part of it.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image


class Picture(gr.Image):
    """`gr.Image` whose pictures are written once, as PNG, and appear whole."""

    is_template = True  # to the page it is the picture that it derives from

    def postprocess(self, value: Any) -> Any:
        return super().postprocess(kept(value, Path(self.GRADIO_CACHE)) if isinstance(value, Image.Image) else value)


def kept(picture: Image.Image, folder: Path) -> str:
    """The file of a picture in this folder, the same for equal pictures."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    path = folder / hashlib.sha256(data.getvalue()).hexdigest() / "picture.png"
    if path.is_file():
        os.utime(path)  # gradio drops files by their age
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(number, "wb") as file:
            file.write(data.getvalue())
        os.replace(draft, path)
    return str(path)
