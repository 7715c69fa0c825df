"""Soft edges, lineart, scribbles and straight lines: where they draw, and where they do not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from scaleweaver.controls import Lineart, Lines, Scribble, SoftEdge, lineart, lines, scribble, softedge
from scaleweaver.controls.hed import CACHED, Hed
from scaleweaver.controls.softedge import step_heights


def square(low: int = 60, high: int = 220, size: int = 128) -> Image.Image:
    image = Image.new("RGB", (size, size), (low, low, low))
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, 3 * size // 4 - 1, 3 * size // 4 - 1), fill=(high,) * 3)
    return image


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[..., 0].astype(int)


def away_from_outline(size: int = 128, margin: int = 8) -> np.ndarray:
    """Pixels (H, W) further than `margin` from the outline of `square`."""
    axis = np.abs(np.arange(size) - (size - 1) / 2)
    distance = np.abs(np.maximum(axis[:, None], axis[None, :]) - size / 4)
    return distance > margin


def test_softedge_is_as_bright_as_the_step_is_high() -> None:
    for step in (0.1, 0.3):
        image = np.full((128, 128, 3), 0.4)
        image[:, 64:] += step
        heights = step_heights(np.round(image * 255).astype(np.uint8))
        assert heights[64].max() == pytest.approx(step, rel=0.3)
        assert values(softedge(image))[64].max() == pytest.approx(2 * heights[64].max() * 255, abs=1)
    assert not values(softedge(square()))[away_from_outline()].any()
    assert values(SoftEdge(gain=1)(square(100, 130))).max() < values(SoftEdge(gain=4)(square(100, 130))).max()


def test_softedge_sees_what_grey_hides() -> None:
    image = Image.new("RGB", (64, 64), (150, 0, 0))
    image.paste((0, 76, 0), (32, 0, 64, 64))
    assert values(softedge(image)).max() > 200
    assert not values(softedge(image.convert("L"))).any()


def test_softedge_by_hed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEWEAVER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    detect, picture = SoftEdge("hed", device="cpu"), np.asarray(square(size=48))
    with pytest.raises(OSError, match=r'HED .*model="classical", which needs no weights'):
        detect(picture)
    with pytest.raises(ValueError, match="device='gpu'; pass auto, cpu, cuda"):
        SoftEdge("hed", device="gpu")(picture)
    torch.manual_seed(0)
    save_file(Hed().state_dict(), tmp_path / CACHED)
    made = values(detect(picture))
    assert np.array_equal(made, np.round(Hed.load().edges(picture) * 255)) and len(np.unique(made)) > 1
    assert np.array_equal(values(softedge(picture, "hed")), made)
    detect.unload()
    assert "network" not in vars(detect)


def test_lineart_lays_ink_on_the_dark_side() -> None:
    made = values(lineart(square()))
    assert made[64, 31] > 200 and made[64, 33] == 0  # the square is the bright side
    assert not made[away_from_outline()].any()
    stroke = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(stroke).line((20, 20, 100, 90), fill="black", width=2)
    drawn = values(lineart(stroke)) > 128
    dark = np.asarray(stroke.convert("L")) < 128
    assert (drawn & dark).sum() > 0.8 * dark.sum() and (drawn & ~dark).sum() < dark.sum()


def test_lineart_contrast() -> None:
    faint = square(100, 112)
    assert values(Lineart(contrast=0.04)(faint)).max() > 200 > values(Lineart(contrast=1)(faint)).max()


def test_scribble_draws_the_outline_and_no_details() -> None:
    image = square()
    ImageDraw.Draw(image).rectangle((60, 60, 63, 63), fill="black")  # too small for the pen
    made = values(scribble(image))
    assert made.any() and not made[away_from_outline()].any()
    assert values(Scribble(shortest=0)(image))[away_from_outline()].any()
    assert values(Scribble(width=0.05)(image)).sum() > 2 * made.sum()


def test_scribble_is_the_same_at_every_size() -> None:
    large, small = (values(scribble(square(size=size))) > 0 for size in (384, 96))
    assert large.mean() == pytest.approx(small.mean(), rel=0.35)
    assert not large[away_from_outline(384, 24)].any()


def test_lines_are_straight() -> None:
    image = Image.new("RGB", (160, 160), "navy")
    ImageDraw.Draw(image).polygon([(20, 130), (80, 20), (140, 130)], fill="yellow")
    made = values(lines(image)) > 0
    rows, columns = np.nonzero(made)
    sides = [((20, 130), (80, 20)), ((80, 20), (140, 130)), ((140, 130), (20, 130))]
    distances = []
    for (x0, y0), (x1, y1) in sides:
        distances.append(np.abs((x1 - x0) * (rows - y0) - (y1 - y0) * (columns - x0)) / np.hypot(x1 - x0, y1 - y0))
    nearest = np.min(distances, axis=0)
    assert nearest.max() < 4
    assert all((distance < 2).sum() > 60 for distance in distances)  # every side is there


def test_lines_leave_out_what_is_short_or_nothing() -> None:
    image = square()
    assert len(Lines().segments(np.asarray(image))) >= 4
    assert values(Lines(shortest=0.1)(image)).any() and not values(Lines(shortest=1)(image)).any()
    assert not values(lines(Image.new("RGB", (64, 64), "teal"))).any()
    assert values(Lines(width=0.05)(image)).sum() > 2 * values(Lines(width=0)(image)).sum()
