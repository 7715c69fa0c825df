"""What a picture says of itself: the settings in its file, and the Python that draws it again."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from scaleweaver.metadata import python_of, read_settings


def settings_and_python(source: str | os.PathLike[str] | Image.Image) -> tuple[dict[str, Any], str]:
    """Both of a picture that anybody may have written."""
    found = read_settings(source)
    try:
        return found, python_of(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the settings in this picture are not those of a drawing ({error!r}); take another file"
        ) from None


def kinds_of(settings: dict[str, Any]) -> list[str]:
    """The kinds of control that settings name."""
    return [str(control["kind"]) for control in settings.get("control", [])]
