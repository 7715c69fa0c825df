"""A sheet of all kinds of control maps of some pictures: how docs/images/controls.png came about.

python examples/preprocessors.py examples/photo.png astronaut.png --out docs/images/controls.png

The photograph is NASA's of Eileen Collins, in the public domain; the package scikit-image ships it. Kinds whose network
cannot be had on this machine are left out, and the terminal says why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from scaleweaver.controls import KINDS, Inpaint, preprocessor
from scaleweaver.images import read_image

CELL, GAP, LABEL, COLUMNS = 176, 8, 18, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, default=[Path(__file__).parent / "photo.png"])
    parser.add_argument("--toybox", type=int, default=1, help="so many of them, from the first, are renders of toybox")
    parser.add_argument("--side", type=int, default=352, help="longest side that the maps are made at")
    parser.add_argument("--out", type=Path, default=Path("out/controls.png"))
    options = parser.parse_args()

    cells: list[tuple[str, Image.Image]] = []
    for index, path in enumerate(options.pictures):
        picture = square(read_image(path), options.side)
        cells.append(("picture", picture))
        for label, kind, settings in wanted(index < options.toybox):
            if made := drawn(kind, settings, picture):
                cells.append((label, made))
        cells += [("", Image.new("RGB", picture.size, "white"))] * (-len(cells) % COLUMNS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(cells).save(options.out, optimize=True)
    print(options.out)


def wanted(toybox: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, kind, settings) of every map; renders of the built-in world have networks of their own."""
    own = {"model": "toybox"} if toybox else {}
    maps = [(kind, kind, own if kind in ("depth", "normals", "pose") else {}) for kind in KINDS]
    return [*maps, ("softedge, HED", "softedge", {"model": "hed"})]


def drawn(kind: str, settings: dict[str, Any], picture: Image.Image) -> Image.Image | None:
    """The map of a picture, if what it needs can be had."""
    try:
        if kind == "inpaint":
            mask = Image.new("L", picture.size)
            ImageDraw.Draw(mask).ellipse([side * part for part in (0.3, 0.6) for side in picture.size], fill=255)
            return Inpaint(mask)(picture)
        return preprocessor(kind, **settings)(picture)
    except (ValueError, OSError) as error:
        print(f"no {kind}: {error}")
        return None


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture as a square of at most `side` pixels."""
    side = min(side, *picture.size)
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def sheet(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Labelled pictures in rows."""
    rows = -(-len(cells) // COLUMNS)
    made = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, rows * (CELL + GAP + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(made)
    for i, (label, picture) in enumerate(cells):
        x, y = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * (CELL + GAP + LABEL)
        pen.text((x, y + CELL + 2), label, fill="black", font_size=12)
        method = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.BOX
        made.paste(picture.resize((CELL, CELL), method), (x, y))
    return made


if __name__ == "__main__":
    main()
