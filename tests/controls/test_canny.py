from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from scaleweaver.controls.canny import Canny, canny


def scene() -> Image.Image:
    image = Image.new("RGB", (61, 47), (40, 90, 160))
    ImageDraw.Draw(image).rectangle((15, 10, 40, 33), fill=(230, 200, 60))
    return image


def test_edges_lie_on_the_outline() -> None:
    edges = canny(scene())
    values = np.asarray(edges)
    assert edges.mode == "RGB" and edges.size == (61, 47)
    assert set(np.unique(values)) == {0, 255}
    rows, columns = np.nonzero(values[:, :, 0])
    assert rows.min() in (9, 10) and rows.max() in (33, 34) and columns.min() in (14, 15) and columns.max() in (40, 41)
    assert not values[14:30, 19:37].any()  # nothing inside


def test_all_kinds_of_input_agree(tmp_path: Path) -> None:
    scene().save(tmp_path / "scene.png")
    array = np.asarray(scene())
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = np.asarray(canny(scene()))
    for source in (tmp_path / "scene.png", array, array / 255.0, tensor, tensor.float() / 255):
        assert np.array_equal(np.asarray(canny(source)), expected)


def test_colour_edges_that_grey_hides() -> None:
    # red and green of equal luminance: no edge in the grey picture
    image = Image.new("RGB", (32, 32), (150, 0, 0))
    image.paste((0, 76, 0), (16, 0, 32, 32))
    assert np.asarray(canny(image)).any()
    assert not np.asarray(canny(image.convert("L"))).any()


def test_thresholds_matter() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) // 32 * 40, (64, 1)))  # one step of 40
    assert np.asarray(Canny(50, 100)(ramp)).any()
    assert not np.asarray(Canny(200, 300)(ramp)).any()
    assert np.array_equal(np.asarray(Canny(50, 100)(ramp)), np.asarray(canny(ramp, low=50, high=100)))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 1)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    assert canny(Image.new("RGB", size, "white")).size == size


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (200, 100, "swap"),
        (-1, 100, "low=-1"),
        (0, float("nan"), "high=nan"),
        ("a", 100, "low='a'"),
        (True, 2, "low=True"),
        (1, None, "None"),
    ],
)
def test_bad_thresholds(low: Any, high: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Canny(low, high)


def test_bad_picture() -> None:
    with pytest.raises(ValueError, match="NaN"):
        canny(np.full((4, 4), np.nan))
