"""Palette, blur, tile, grey and inpaint: what they keep of a picture and what they drop."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scaleweaver.controls import Blur, Inpaint, Palette, Tile, blur, grey, inpaint, palette, tile


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_palette_is_the_mean_of_every_cell() -> None:
    picture = noise(128, 192)
    made = np.asarray(palette(picture))
    cells = made.reshape(8, 16, 12, 16, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # one colour a cell
    means = picture.reshape(8, 16, 12, 16, 3).mean(axis=(1, 3))
    assert np.abs(cells[:, 0, :, 0] - means).max() <= 0.51


def test_palette_cells() -> None:
    colours = [len(np.unique(np.asarray(Palette(n)(noise(90, 90))).reshape(-1, 3), axis=0)) for n in (1, 3, 9)]
    assert colours == [1, 9, 81]
    tiny = noise(3, 4)
    assert np.array_equal(np.asarray(palette(tiny)), tiny)  # no cell is below a pixel


def test_blur_spreads_a_point_by_its_radius() -> None:
    picture = np.zeros((101, 101, 3), np.uint8)
    picture[50, 50] = 255
    picture[48:53, 48:53] = 255
    sharp, soft = np.asarray(Blur(0)(picture)), np.asarray(Blur(0.05)(picture), np.float64)[..., 0]
    assert np.array_equal(sharp, picture)
    rows = np.arange(101) - 50
    spread = np.sqrt((soft.sum(axis=1) * rows**2).sum() / soft.sum())
    assert spread == pytest.approx(np.sqrt(5.05**2 + 2), rel=0.05)  # of the Gaussian and of the square


def test_blur_is_the_same_at_every_size() -> None:
    large = Image.fromarray(noise(12, 12)).resize((480, 480), Image.Resampling.BICUBIC)
    small = large.resize((120, 120), Image.Resampling.LANCZOS)
    difference = np.asarray(blur(large).resize((120, 120), Image.Resampling.LANCZOS), int) - np.asarray(blur(small))
    assert np.abs(difference).mean() < 1 < np.abs(np.asarray(small, int) - np.asarray(blur(small))).mean()


def test_tile_drops_what_is_finer_than_its_factor() -> None:
    fine = np.indices((64, 64)).sum(axis=0) % 2 * 255  # a chequerboard of single pixels
    coarse = np.indices((64, 64)).sum(axis=0) // 32 % 2 * 200
    picture = np.repeat(fine[..., None], 3, axis=2).astype(np.uint8)
    assert np.asarray(tile(picture)).std() < 1
    assert np.asarray(tile(np.repeat(coarse[..., None], 3, axis=2).astype(np.uint8))).std() > 80
    assert np.array_equal(np.asarray(Tile(1)(picture)), picture)


def test_grey_has_the_luma_and_no_colour() -> None:
    made = np.asarray(grey(noise(20, 30)), int)
    assert (made == made[..., :1]).all()
    assert np.abs(made[..., 0] - noise(20, 30) @ [0.299, 0.587, 0.114]).max() < 1


def test_inpaint_marks_the_mask_alone() -> None:
    picture = noise(40, 60)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 15:40] = 200
    made = np.asarray(inpaint(picture, mask))
    assert (made[10:20, 15:40] == (255, 0, 255)).all()
    assert np.array_equal(made[mask == 0], picture[mask == 0])
    assert (np.asarray(Inpaint(mask, color=[1, 2, 3])(picture))[mask > 0] == (1, 2, 3)).all()


def test_inpaint_reads_masks_of_any_kind(tmp_path) -> None:
    picture, mask = noise(8, 8), np.eye(8)
    expected = np.asarray(inpaint(picture, mask))
    Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    for source in (tmp_path / "mask.png", mask.astype(bool), Image.open(tmp_path / "mask.png").convert("RGB")):
        assert np.array_equal(np.asarray(inpaint(picture, source)), expected)


def test_inpaint_is_the_same_with_the_same_mask() -> None:
    black, white = np.zeros((4, 4)), np.ones((4, 4))
    assert Inpaint(black) == Inpaint(black.copy()) and hash(Inpaint(black)) == hash(Inpaint(black.copy()))
    assert Inpaint(black) != Inpaint(white) and Inpaint(black) != Inpaint(black, color=(0, 0, 0))


def test_inpaint_refuses() -> None:
    with pytest.raises(ValueError, match="mask is 8x4 but the picture is 4x4"):
        inpaint(noise(4, 4), Image.new("L", (8, 4)))
    with pytest.raises(ValueError, match="inpaint mask is a NoneType"):
        Inpaint(None)
    for color in ("red", (1, 2), (1, 2, 300), (0.5, 0, 0)):
        with pytest.raises(ValueError, match="pass red, green and blue"):
            Inpaint(Image.new("L", (4, 4)), color=color)
