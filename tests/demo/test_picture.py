"""Pictures of the page lie in files that appear whole, once each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from scaleweaver.demo.widgets import picture as widget
from scaleweaver.demo.widgets.picture import Picture, kept


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_equal_pictures_share_a_file_that_is_written_once(tmp_path: Path) -> None:
    first = kept(noise(0), tmp_path)
    before = Path(first).stat().st_ino
    assert kept(noise(0), tmp_path) == first != kept(noise(1), tmp_path)
    assert Path(first).stat().st_ino == before
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(noise(0)))
    assert [file.name for file in Path(first).parent.iterdir()] == ["picture.png"]


def test_a_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    replace = widget.os.replace

    def look_first(draft: str, path: Path) -> None:
        seen.append(Path(path).is_file())
        replace(draft, path)

    monkeypatch.setattr(widget.os, "replace", look_first)
    shown = Picture().postprocess(noise(2))
    assert shown is not None and Path(shown.path).name == "picture.png"
    assert seen == [False]  # all was written before its name was there
