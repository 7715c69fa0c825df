from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scaleweaver.images import fit, is_two_level, mask_tensor, read_image, to_tensor


def rgb(width: int = 6, height: int = 4) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def values(image: Image.Image) -> np.ndarray[Any, Any]:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    pixels = rgb()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [
        tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, pixels / 255.0,
        (pixels / 255.0).astype(np.float32), pixels.astype(np.uint16) * 257, tensor, tensor / 255.0, tensor[None],
    ]  # fmt: skip
    for source in sources:
        assert np.array_equal(values(read_image(source)), pixels)


def test_the_callers_image_is_not_shared() -> None:
    original = Image.fromarray(rgb())
    read_image(original).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(original), rgb())


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert values(read_image(image))[0].tolist() == [[200, 0, 0], [255, 255, 255], [127, 127, 127]]
    grey = np.array([[[0, 0], [0, 255]]], dtype=np.uint8)
    assert values(read_image(grey))[0].tolist() == [[255, 255, 255], [0, 0, 0]]
    assert values(read_image(Image.fromarray(grey, "LA")))[0, 0].tolist() == [255, 255, 255]


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    assert values(read_image(tmp_path / "p.png"))[0].tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBX", "HSV"])
def test_other_modes(mode: str) -> None:
    white = Image.new("RGB", (3, 2), "white").convert(mode)
    assert (values(read_image(white)) >= 254).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257 * 7, 32896, 65535]], dtype=np.uint16)
    expected = [0, 7, 128, 255]
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    assert values(read_image(tmp_path / "grey16.png"))[0, :, 1].tolist() == expected
    assert values(read_image(Image.fromarray(ramp.astype(np.int32))))[0, :, 2].tolist() == expected
    assert values(read_image(ramp))[0, :, 0].tolist() == expected
    assert values(read_image(torch.from_numpy(ramp)))[0, :, 0].tolist() == expected


def test_float_and_boolean_arrays() -> None:
    floats = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert values(read_image(Image.fromarray(floats)))[0, :, 0].tolist() == [0, 128, 255]
    assert values(read_image(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    assert values(read_image(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)))[0, :, 0].tolist() == [0, 255]
    assert values(read_image(np.zeros((2, 3, 1), dtype=np.float16))).shape == (2, 3, 3)


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the left half belongs to the top
    image.save(tmp_path / "turned.png", exif=exif)
    upright = values(read_image(tmp_path / "turned.png"))
    assert upright.shape == (8, 4, 3)
    assert (upright[:4] == 255).all() and (upright[4:] == 0).all()


def test_one_pixel() -> None:
    assert read_image(np.zeros((1, 1), dtype=np.uint8)).size == (1, 1)


def huge_png(path: Path) -> Path:
    """A PNG whose header claims 20000 x 20000 pixels and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def large_png(path: Path) -> Path:
    Image.new("1", (12000, 9000)).save(path)
    return path


def truncated(path: Path, name: str) -> Path:
    Image.fromarray(rgb(64, 64)).save(path / name)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    return path / name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        tmp_path / "missing.png": "no file",
        tmp_path: "no file",
        tmp_path / "words.png": "not an image file",
        tmp_path / "empty.png": "not an image file",
        truncated(tmp_path, "cut.png"): "truncated",
        truncated(tmp_path, "cut.jpg"): "truncated",
        huge_png(tmp_path / "huge.png"): "100 million pixels",
        large_png(tmp_path / "large.png"): "100 million pixels",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            read_image(path, 'control "canny"')
        assert str(error.value).startswith('control "canny"')
    with pytest.raises(ValueError, match="download it first"):
        read_image("https://example.com/a.png")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 0)), "empty"),
        (torch.zeros(3, 0, 4), "empty"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64; pass uint8"),
        (np.zeros((4, 4), complex), "dtype complex128"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "dtype int64"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), np.inf, np.float32), "infinite"),
        (torch.full((3, 4, 4), float("nan")), "NaN"),
        (np.full((4, 4), 255.0), "divide by 255"),
        (torch.full((3, 4, 4), -1.0), r"x / 2 \+ 0.5"),
        (np.zeros((3, 8, 9), np.uint8), "channels to the end"),
        (np.zeros((8, 9, 7), np.uint8), "1, 2, 3 or 4 channels"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\)"),
        (torch.zeros(8, 9, 3), "channels to the front"),
        (torch.zeros(2, 3, 4, 4), "2 images"),
        (Image.fromarray(np.full((2, 2), -5, np.int32)), 'mode "I"'),
        (7, "is a int; pass a path"),
        (None, "NoneType"),
    ],
)
def test_bad_values(bad: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_image(bad)


def test_fit_rules() -> None:
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    image.paste("white", (0, 0, 10, 20))
    image.paste("white", (30, 0, 40, 20))
    crop = values(fit(image, 20, 20, "crop"))
    assert crop.shape == (20, 20, 3) and (crop[:, 2:-2] == (10, 20, 30)).all()  # both white ends are gone
    pad = values(fit(image, 40, 40, "pad"))
    assert (pad[:10] == 0).all() and (pad[30:] == 0).all() and (pad[10:30, :8] == 255).all()
    stretch = values(fit(image, 20, 20, "stretch"))
    assert (stretch[:, :3] > 250).all() and (stretch[:, -3:] > 250).all()
    assert fit(image, 20, 40) is image


def test_two_level_images_stay_two_level() -> None:
    edges = Image.fromarray((np.random.default_rng(1).random((50, 70)) < 0.2).astype(np.uint8) * 255).convert("RGB")
    for resize in ("crop", "pad", "stretch"):
        assert is_two_level(fit(edges, 33, 41, resize))
        assert is_two_level(fit(edges, 133, 141, resize))
    assert not is_two_level(fit(edges, 33, 41, two_level=False))
    assert not is_two_level(fit(Image.fromarray(rgb()), 3, 3))


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [1024, 700, 300, 129])
def test_a_line_of_one_pixel_survives_unbroken(size: int, resize: str) -> None:
    index = np.arange(size)
    for rows, columns in ((np.full(size, size // 3), index), (index, np.full(size, size // 3 + 1)), (index, index)):
        drawn = np.zeros((size, size), np.uint8)
        drawn[rows, columns] = 255
        small = values(fit(read_image(drawn), 128, 128, resize))[..., 0] == 255
        across = small.any(1) if (rows == index).all() else small.any(0)
        assert across.all()  # every row or column of the picture still meets the line
        assert small.sum() <= 2 * 128  # which did not grow thick


def test_a_stretched_line_survives_in_the_axis_that_shrinks_most() -> None:
    drawn = np.zeros((1024, 64), np.uint8)
    drawn[500], drawn[:, 20] = 255, 255
    small = values(fit(read_image(drawn), 128, 128, "stretch"))[..., 0] == 255
    assert small[62].all() and small[:, 41].all()


def test_masks_keep_the_area_not_the_lines() -> None:
    drawn = np.zeros((64, 64), np.uint8)
    drawn[:, :32], drawn[:, 48] = 255, 255
    mask = mask_tensor(drawn, 8, 8)
    assert (mask[:, :4] == 1).all() and (mask[:, 4:] == 0).all()
    drawn[:, 32:36] = 255  # half of the next column
    assert (mask_tensor(drawn, 8, 8)[:, 4] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((10, 10, "fill"), 'pass "crop", "pad" or "stretch"'), ((0, 10), "at least 1"), ((4, -1), "at least 1")],
)
def test_fit_refuses(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(Image.new("RGB", (4, 4)), *arguments)


def test_tensors() -> None:
    tensor = to_tensor(Image.fromarray(rgb()))
    assert tensor.shape == (3, 4, 6) and tensor.dtype == torch.float32
    assert torch.equal(((tensor + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(rgb()))
    mask = mask_tensor(np.array([[0, 255]], dtype=np.uint8), 2, 4, "stretch")
    assert mask.tolist() == [[0, 0, 1, 1]] * 2
