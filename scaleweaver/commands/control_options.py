"""The `--control` options of `scaleweaver generate`, read before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaleweaver.contracts import Control


def read_controls(
    named: Sequence[str],
    scale: Sequence[float],
    start: Sequence[float],
    end: Sequence[float],
    scales: Sequence[str],
) -> list[Control]:
    """A control for every KIND=PATH; each other option was given once for all of them, once for each, or not at all."""
    columns: dict[str, Sequence[Any]] = {"scale": scale, "start": start, "end": end}
    columns["scales"] = [read_scales(text) for text in scales]
    for name, values in columns.items():
        if len(values) not in (0, 1, len(named)) or (values and not named):
            raise ValueError(
                f"{len(values)} times --control-{name} for {len(named)} times --control; pass one for all or one for "
                "each"
            )
    return [
        Control(*_kind_and_path(entry), **{name: each[row % len(each)] for name, each in columns.items() if each})
        for row, entry in enumerate(named)
    ]


def read_scales(text: str) -> slice | list[int]:
    """ "2:5", "2:" and ":" as in Python, or numbers with commas."""
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        first, last = (int(part) if part.strip() else None for part in text.split(":"))
        return slice(first, last)
    except ValueError:
        raise ValueError(f"--control-scales {text!r} is neither FIRST:END, such as 2:5 or 2:, nor 0,3,5") from None


def _kind_and_path(entry: str) -> tuple[str, str]:
    kind, _, path = entry.partition("=")
    if not kind or not path:
        raise ValueError(f"--control {entry!r} is not KIND=PATH; write for example --control canny=edges.png")
    if not Path(path).is_file():
        raise ValueError(f"--control {entry!r}: there is no file {path!r}; check the path")
    return kind, path
