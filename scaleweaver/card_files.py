"""A model card on disk and the files it shows: read from one place, written whole to another, under another name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_SHOWN = re.compile(r"\]\(([^()\s#]+)\)|^\s+url: (\S+)$", re.MULTILINE)  # links, and the widget's pictures
_TRAVELS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".txt")  # what a card may show


@dataclass(frozen=True)
class Document:
    """A card that was read, with the files it shows, so that it stays whole when its model is saved elsewhere."""

    text: str
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: Path) -> Document | None:
        """README.md of a folder and the pictures and texts below the folder that it links to."""
        card = folder / "README.md"
        if not card.is_file():
            return None
        text = card.read_text(encoding="utf-8")
        shown = {link or url for link, url in _SHOWN.findall(text)}
        names = [name for name in sorted(shown) if name.lower().endswith(_TRAVELS) and _lies_below(name)]
        return cls(text, {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()})

    def write(self, folder: Path) -> None:
        """Beside what is there: a file of the same name stays."""
        for name, data in {"README.md": self.text.encode(), **self.files}.items():
            file = folder / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)

    def renamed(self, name: str) -> Document:
        """The card of a pipeline under another name: its title, and the calls that load by the old title."""
        title = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        if title is None:
            return self
        text = self.text[: title.start(1)] + name + self.text[title.end(1) :]
        call = re.compile(rf"""(from_pretrained\(\s*["']){re.escape(title[1].strip())}(["'])""")
        return Document(call.sub(lambda found: f"{found[1]}{name}{found[2]}", text), self.files)

    def of_control(self, name: str, kind: str, base: str | None) -> Document:
        """The card of a control in a repository of its own: its snippet loads from there, on the Hub model `base`."""
        text, pipe = self.text, "pipe = VARControlPipeline.from_pretrained("
        if base is not None and is_hub_id(base):
            card = ModelCard(text, ignore_metadata_errors=True)
            card.data["base_model"], card.data["base_model_relation"] = base, "adapter"
            text = _replace_line(card.content, pipe, f'{pipe}"{base}")')
        load = f'pipe.load_control("{name}", name="{kind}", replace=True)'
        changed = _replace_line(text, "pipe.load_control(", load)
        if changed == text:
            changed = _replace_line(text, pipe, lambda line: f"{line}\n{load}")
        return Document(changed, self.files)


def _replace_line(text: str, start: str, new: str | Callable[[str], str]) -> str:
    """The text with another first line of those that start so."""
    line = re.compile(rf"^{re.escape(start)}.*$", re.MULTILINE)
    return line.sub(lambda found: new if isinstance(new, str) else new(found[0]), text, count=1)


def is_hub_id(name: str) -> bool:
    """Whether a model's name says user/repository and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name)


def _lies_below(name: str) -> bool:
    """A relative path that stays in its folder, on Windows too; what the Hub's cache links to is not looked at."""
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and not set(name) & {":", "\\"}
