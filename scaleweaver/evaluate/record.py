"""An evaluation on disk: pictures and scores are written as they come, and a later call goes on where one stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.toybox.store import agree_on_settings, complete_lines, write_atomic

Pixels = NDArray[np.uint8]


class Record:
    """The folder of one evaluation: settings.json, and below rows/<name>/ scores.jsonl with the pictures beside it."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # as JSON gives it back, so that a tuple equals a list
        agree_on_settings(folder / "settings.json", json.loads(json.dumps(settings)))
        self._rows: dict[str, RowRecord] = {}

    def row(self, name: str) -> RowRecord:
        if name not in self._rows:
            # letters of controls' names stay as they are: my_canny is not my-canny
            self._rows[name] = RowRecord(self.folder / "rows" / re.sub(r"[^A-Za-z0-9._-]+", "-", name))
        return self._rows[name]


class RowRecord:
    """Scores of one row by number, and its pictures as PNG files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lines = folder, folder / "scores.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = complete_lines(self._lines)
        write_atomic(self._lines, "".join(f"{line}\n" for line in kept).encode())  # drops a half-written last line
        entries = [json.loads(line) for line in kept]
        self.scores: dict[int, dict[str, Any]] = {entry["number"]: entry["scores"] for entry in entries}

    def missing(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number not in self.scores]

    def write(self, number: int, scores: Mapping[str, Any], **pictures: Pixels) -> None:
        """Pictures by name first, then the line that declares this number complete."""
        for name, picture in pictures.items():
            data = BytesIO()
            Image.fromarray(picture).save(data, "PNG", compress_level=3)
            write_atomic(self._file(number, name), data.getvalue())
        line = json.dumps({"number": number, "scores": scores}, allow_nan=False)
        with open(self._lines, "a", encoding="utf-8") as lines:
            lines.write(line + "\n")
        self.scores[number] = json.loads(line)["scores"]

    def picture(self, number: int, name: str = "picture") -> Pixels:
        """(H, W, 3) uint8, as it was written."""
        with Image.open(self._file(number, name)) as image:
            return np.asarray(image.convert("RGB"))

    def _file(self, number: int, name: str) -> Path:
        ending = "" if name == "picture" else f"-{name}"
        return self.folder / f"{number:06d}{ending}.png"
