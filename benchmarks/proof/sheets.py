"""Contact sheets: the first pictures, none chosen, the worst ones with their prompts, and a strip of strengths.

They lie as the model's card and those of its controls show them: images/ and controls/KIND/sheet.jpg.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from proof.evaluation import FULL, HALF, Evaluation
from proof.targets import NAMES
from scaleweaver.train.data import Pixels

SHOWN = 64  # pictures of prompts alone, and under each control
FAILURES = 48
STRIPS = 4  # scenes of every control on the strip of strengths
COLUMNS = 8
GAP = 4  # pixels between pictures
LARGEST = 260_000  # bytes of a file: all of them together stay below 2 MB
SIDE = 128  # pixels; smaller pictures are shown larger
JUDGED = ("kind", "color", "count", "relation", "pose", "clothes")  # facts that a failure can be wrong in
CAPTIONS = {
    "prompts.jpg": f"The first {SHOWN} [prompts](images/prompts.txt) of the test split without control, none chosen",
    "strengths.jpg": f"The same scenes under their map at strength 0, {HALF} and {FULL:.0f}",
    "failures.jpg": f"The {FAILURES} worst pictures of prompts alone: most facts wrong by the judge",
    "reconstructions.jpg": "True renders above, below them what the tokenizer makes of them",
}


def write_sheets(run: Evaluation, folder: Path) -> list[Path]:
    """All sheets; pictures that no part has drawn are drawn now."""
    everyone, images = run.rows(""), folder / "images"
    first = everyone[:SHOWN]
    plain = run.drawn()
    written = [
        save(images / "prompts.jpg", grid([_tile(picture) for picture in plain[first]])),
        save(images / "reconstructions.jpg", grid(_stacked(run.test.references[:16], run.reconstructed[:16]))),
    ]
    if worst := failures(run, plain):
        written.append(save(images / "failures.jpg", grid(worst, columns=6)))
    lines = [f"{i // COLUMNS + 1}.{i % COLUMNS + 1} {run.test.prompts[i]}" for i in first]
    (images / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    strips = []
    for kind in run.kinds:
        rows = run.rows(kind)[:SHOWN]
        pairs = _stacked(run.test.maps(kind, rows), run.drawn(kind, FULL)[: len(rows)])
        written.append(save(folder / "controls" / kind / "sheet.jpg", grid(pairs)))
        some = run.rows(kind, fewer=True)[:STRIPS]
        half, full = (run.drawn(kind, strength)[: len(some)] for strength in (HALF, FULL))
        tiles = [run.test.maps(kind, some), plain[some], half, full]
        labels = (kind, "strength 0", f"{HALF}", f"{FULL:.0f}")
        strips += [
            _labelled(_tile(picture), label)
            for row in zip(*tiles, strict=True)
            for picture, label in zip(row, labels, strict=True)
        ]
    if strips:
        written.append(save(images / "strengths.jpg", grid(strips)))
    return written


def failures(run: Evaluation, pictures: Pixels) -> list[Image.Image]:
    """The pictures with most wrong facts, their prompts below them, and what is wrong."""
    found = run.facts(pictures, run.test.asked)
    wrong = [[right for name in JUDGED for right in each.get(name, ())].count(False) for each in found]
    worst = sorted((i for i in range(len(pictures)) if wrong[i]), key=lambda i: (-wrong[i], i))[:FAILURES]
    font = ImageFont.load_default(11)
    width = SIDE + 56
    texts = [tuple(_wrapped(text, font, width - 8) for text in (run.test.prompts[i], _wrong(found[i]))) for i in worst]
    height = 14 * max(len(prompt) + len(why) for prompt, why in texts) + 4
    tiles = []
    for i, (prompt, why) in zip(worst, texts, strict=True):
        tile = Image.new("RGB", (width, SIDE + height), "white")
        tile.paste(_tile(pictures[i]), ((width - SIDE) // 2, 0))
        draw = ImageDraw.Draw(tile)
        draw.text((0, SIDE + 2), "\n".join(prompt), "black", font, spacing=2)
        draw.text((0, SIDE + 2 + 14 * len(prompt)), "\n".join(why), "#b00020", font, spacing=2)
        tiles.append(tile)
    return tiles


def _wrong(found: Mapping[str, Sequence[bool]]) -> str:
    return "wrong: " + ", ".join(NAMES.get(name, name) for name in JUDGED if not all(found.get(name, ())))


def grid(tiles: Sequence[Image.Image], columns: int = COLUMNS) -> Image.Image:
    """Tiles of one size in rows on white."""
    width, height = tiles[0].width + GAP, tiles[0].height + GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * width - GAP, rows * height - GAP), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def save(path: Path, sheet: Image.Image) -> Path:
    """JPEG in the best quality that keeps the file small, without mixing the colours of neighbours where it can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in (92, 88, 84, 80, 75, 70, 60, 50, 40):
        data = BytesIO()
        sheet.save(data, "JPEG", quality=quality, subsampling=0 if quality >= 80 else 2)
        if data.tell() <= LARGEST:
            break
    path.write_bytes(data.getvalue())
    return path


def picture_text(document: Path, folder: Path) -> str:
    """The sheets of a model as markdown for a document, its links relative to where the document lies."""
    lines = []
    base = os.path.relpath(folder, document.parent)
    for name, caption in CAPTIONS.items():
        if (folder / "images" / name).is_file():
            link = os.path.normpath(os.path.join(base, "images"))
            lines += [f"![{caption.replace('[prompts](images/prompts.txt)', 'prompts')}]({link}/{name})", ""]
            lines += [f"{caption.replace('(images/', f'({link}/')}.", ""]
    sheets = sorted(folder.glob("controls/*/sheet.jpg"))
    if sheets:
        links = [f"[{path.parent.name}]({os.path.relpath(path, document.parent)})" for path in sheets]
        lines += [f"{SHOWN} maps and the pictures drawn under them, none chosen: {', '.join(links)}.", ""]
    return "\n".join(lines)


def _stacked(above: Sequence[Pixels] | Pixels, below: Pixels) -> list[Image.Image]:
    """Pictures over each other, in pairs."""
    pairs = []
    for one, other in zip(above, below, strict=True):
        pair = Image.new("RGB", (SIDE, 2 * SIDE))
        pair.paste(_tile(one))
        pair.paste(_tile(other), (0, SIDE))
        pairs.append(pair)
    return pairs


def _tile(picture: Any) -> Image.Image:
    image = Image.fromarray(np.asarray(picture))
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE))


def _labelled(tile: Image.Image, label: str) -> Image.Image:
    framed = Image.new("RGB", (tile.width, tile.height + 16), "white")
    framed.paste(tile, (0, 16))
    ImageDraw.Draw(framed).text((2, 1), label, "black", ImageFont.load_default(11))
    return framed


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
