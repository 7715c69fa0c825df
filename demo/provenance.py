"""What a picture says of itself: the settings in its file, and the Python that draws it again."""

from __future__ import annotations

from typing import Any

from scaleweaver.demo.encoded import opened
from scaleweaver.metadata import python_of, read_settings


def settings_and_python(source: Any, most_pixels: int) -> tuple[dict[str, Any], str]:
    """Both of a picture that anybody may have written, a path or an open file."""
    with opened(source, "picture", most_pixels) as picture:
        found = read_settings(picture)
    return found, python_of(found)


def kinds_of(settings: dict[str, Any]) -> list[str]:
    """The kinds of control that settings name."""
    return [str(control["kind"]) for control in settings.get("control", [])]
