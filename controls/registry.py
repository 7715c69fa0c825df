"""Preprocessors by the name of their kind, for settings files and the command line."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from scaleweaver.controls.base import Preprocessor

_CLASS_OF = {
    "canny": "canny.Canny",
    "depth": "depth.Depth",
    "pose": "pose.Pose",
    "softedge": "softedge.SoftEdge",
    "lineart": "lineart.Lineart",
    "scribble": "scribble.Scribble",
    "lines": "lines.Lines",
    "normals": "normals.Normals",
    "segmentation": "segmentation.Segmentation",
    "palette": "palette.Palette",
    "blur": "blur.Blur",
    "tile": "tile.Tile",
    "grey": "grey.Grey",
    "inpaint": "inpaint.Inpaint",
}
KINDS = tuple(_CLASS_OF)


def preprocessor(kind: str, **settings: Any) -> Preprocessor:
    """The configured preprocessor of a kind: `preprocessor("canny", low=50)` is `Canny(low=50)`."""
    if kind not in _CLASS_OF:
        raise ValueError(f"no preprocessor makes {kind!r} maps; there is {', '.join(KINDS)}; or pass a ready map")
    module, name = _CLASS_OF[kind].split(".")
    make: type[Preprocessor] = getattr(import_module(f"scaleweaver.controls.{module}"), name)
    takes = {field.name: field for field in fields(make) if field.init}
    unknown = [name for name in settings if name not in takes]
    if unknown:
        raise ValueError(f"{kind} does not take {', '.join(unknown)}; it can be given {', '.join(takes)}")
    missing = [name for name, field in takes.items() if field.default is MISSING and name not in settings]
    if missing:
        raise ValueError(f"{kind} needs {', '.join(missing)}; it can be given {', '.join(takes)}")
    return make(**settings)
