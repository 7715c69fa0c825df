"""Places in documents that are written by a program: what stands between <!-- name --> and <!-- /name -->."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path


def split_at_marks(document: Path, name: str = "measured") -> tuple[str, str]:
    """What stands before and after the place of that name."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, opened, rest = document.read_text(encoding="utf-8").partition(start)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{document} has no place for the tables; write {start.strip()} and {end} there")
    return head + start, end + tail


def places(document: Path, names: Collection[str]) -> list[str]:
    """The places among `names` that a document has; one without any is refused."""
    text = document.read_text(encoding="utf-8")
    held = [name for name in names if f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text]
    if not held:
        expected = ", ".join(f"<!-- {name} --> and <!-- /{name} -->" for name in names)
        raise ValueError(f"{document} has no place for the tables; write one of {expected} there")
    return held


def fill(document: Path, texts: Mapping[str, str]) -> None:
    """Write each text into the place of its name, if the document has it."""
    for name in places(document, texts):
        head, tail = split_at_marks(document, name)
        document.write_text(f"{head}{texts[name].rstrip()}\n\n{tail}", encoding="utf-8")
