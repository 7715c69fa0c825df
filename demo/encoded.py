"""Pictures of visitors, which may be anything: files and texts that are looked at before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image, UnidentifiedImageError

from scaleweaver.images import read_image

PNG = "data:image/png;base64,"
MAX_CHARACTERS = 16_000_000


def open_picture(source: Any, name: str, most_pixels: int) -> Image.Image:
    """A path or an open file as RGB, refused by its header where it is too large."""
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > most_pixels:
                raise ValueError(
                    f"the {name} is {opened.width}x{opened.height}, more than {most_pixels / 1e6:.3g} million pixels;"
                    " scale it down"
                )
            opened.load()
            return read_image(opened, name)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        raise ValueError(
            f"the {name} is no picture that can be read, or is damaged; pass a PNG, JPEG or WebP"
        ) from None


def to_bytes(text: str, name: str) -> bytes:
    """Base64, with or without the head of a data URL."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise ValueError(f"the {name} is no text of at most {MAX_CHARACTERS:,} characters; pass base64 of a file")
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except binascii.Error:
        raise ValueError(f"the {name} is not base64; pass base64.b64encode(file).decode()") from None


def decode(text: str, name: str, *, most_pixels: int) -> Image.Image:
    """A picture written as base64."""
    return open_picture(io.BytesIO(to_bytes(text, name)), name, most_pixels)


def data_url(picture: Image.Image) -> str:
    """A picture as text for a page; one of this package's keeps its settings."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return PNG + base64.b64encode(file.getvalue()).decode()
