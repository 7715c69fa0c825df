"""Pictures for the page in files that no visitor ever reads half of.

gradio lays a picture down under a name made of its content, and writes it there again when an equal one is shown:
whoever reads the file at that moment gets a part of it. What is a file already it leaves alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image


def in_files(handler: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The same handler of an event, the pictures that it returns as their files."""

    @wraps(handler)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(kept(x) if isinstance(x, Image.Image) else x for x in handler(*args, **kwargs))

    return run


def kept(picture: Image.Image | None, folder: str | Path | None = None) -> str | None:
    """The file of a picture, the same for equal pictures, in this folder or in gradio's own; None for none."""
    if picture is None:
        return None
    data = io.BytesIO()
    picture.save(data, "PNG")
    path = Path(folder or get_upload_folder()) / hashlib.sha256(data.getvalue()).hexdigest() / "picture.png"
    if path.is_file():
        os.utime(path)  # gradio drops files by their age
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, draft = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(number, "wb") as file:
            file.write(data.getvalue())
        os.replace(draft, path)
    return str(path)
