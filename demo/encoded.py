"""What visitors send, which may be anything: files and texts that are looked at before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, UnidentifiedImageError

from scaleweaver.images import read_image

PNG = "data:image/png;base64,"
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_CHARACTERS = 16_000_000
MAX_POSE = 1_000_000  # characters


@contextmanager
def opened(source: Any, name: str, most_pixels: int) -> Iterator[Image.Image]:
    """A path or an open file, of which the header alone was read: refused where it is too large, or of other formats.

    What PIL finds wrong later, while it decodes, is told as well.
    """
    try:
        with Image.open(source, formats=FORMATS) as picture:
            if picture.width * picture.height > most_pixels:
                raise ValueError(
                    f"the {name} is {picture.width}x{picture.height}, more than {most_pixels / 1e6:.3g} million"
                    " pixels; scale it down"
                )
            yield picture
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError):
        raise ValueError(
            f"the {name} is no picture that can be read, or is damaged; pass a PNG, JPEG or WebP"
        ) from None


def open_picture(source: Any, name: str, most_pixels: int) -> Image.Image:
    """A path or an open file as RGB."""
    with opened(source, name, most_pixels) as picture:
        picture.load()
        return read_image(picture, name)


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


def read_pose(text: str, most_people: int) -> dict[str, Any]:
    """The record in OpenPose JSON. It is text alone: what the library would take for the name of a file is refused."""
    if not isinstance(text, str) or len(text) > MAX_POSE:
        raise ValueError(f"the pose is no text of at most {MAX_POSE:,} characters; pass OpenPose JSON")
    try:
        record = json.loads(text.lstrip("\ufeff"))  # the mark that some editors put first
    except (ValueError, RecursionError):
        raise ValueError("the pose is not JSON; pass OpenPose JSON") from None
    if not isinstance(record, dict):
        raise ValueError(f'the pose is a {type(record).__name__}; pass one object with the list "people"')
    people = record.get("people")
    if isinstance(people, list) and len(people) > most_people:
        raise ValueError(f"the pose has {len(people)} people; keep at most {most_people}")
    return record


def data_url(picture: Image.Image) -> str:
    """A picture as text for a page; one of this package's keeps its settings."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return PNG + base64.b64encode(file.getvalue()).decode()
