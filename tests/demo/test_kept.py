"""Pictures of the page lie in files that appear whole, once each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from scaleweaver.demo import kept as module
from scaleweaver.demo.kept import in_files, kept


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_equal_pictures_share_a_file_that_is_written_once(tmp_path: Path) -> None:
    first = kept(noise(0), tmp_path)
    assert first is not None and kept(None, tmp_path) is None
    before = Path(first).stat().st_ino
    assert kept(noise(0), tmp_path) == first != kept(noise(1), tmp_path)
    assert Path(first).stat().st_ino == before
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(noise(0)))
    assert [file.name for file in Path(first).parent.iterdir()] == ["picture.png"]


def test_a_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    replace = module.os.replace

    def look_first(draft: str, path: Path) -> None:
        seen.append(Path(path).is_file())
        replace(draft, path)

    monkeypatch.setattr(module.os, "replace", look_first)
    assert Path(kept(noise(2), tmp_path) or "").name == "picture.png"
    assert seen == [False]  # all was written before its name was there


def test_handlers_return_files_in_place_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_upload_folder", lambda: str(tmp_path))
    path, words, nothing = in_files(lambda number: (noise(number), "words", None))(3)
    assert (words, nothing) == ("words", None)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(noise(3)))
