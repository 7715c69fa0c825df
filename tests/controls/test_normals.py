"""Normals of reliefs whose slopes are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_controls import save_depth

from scaleweaver.controls import Depth, Normals, normals
from scaleweaver.controls.normals import read_depth


def directions(image: Image.Image) -> np.ndarray:
    """(H, W, 3) from -1 to 1: right, up, towards the viewer."""
    return np.asarray(image, float) / 127.5 - 1


def slope(height: int = 80, width: int = 80, *, axis: int) -> np.ndarray:
    """Depth that grows by one over the short side, rightwards (1) or downwards (0)."""
    return (np.indices((height, width))[axis] / min(height, width)).clip(0, 1)


def test_a_flat_surface_faces_the_viewer() -> None:
    made = np.asarray(Normals("none")(np.full((30, 40), 0.5)))
    assert (made == (128, 128, 255)).all()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(1, (-1, 0, 1)), (0, (0, 1, 1))],  # what gets nearer to the right looks left, what gets nearer downwards looks up
)
def test_a_slope_of_one_in_one(axis: int, expected: tuple[int, int, int]) -> None:
    detect = Normals("none", relief=1.0, smooth=0)
    middle = directions(detect(slope(axis=axis)))[20:60, 20:60]
    assert np.abs(middle - np.array(expected) / np.sqrt(2)).max() < 0.02
    flatter = directions(Normals("none", relief=0.5, smooth=0)(slope(axis=axis)))[40, 40]
    assert np.abs(flatter - np.array(expected) * (0.5, 0.5, 1) / np.sqrt(1.25)).max() < 0.02
    assert (np.abs(np.linalg.norm(directions(detect(slope(axis=axis))), axis=2) - 1) < 0.02).all()


def test_deep_maps_keep_their_precision() -> None:
    gentle = slope(axis=1) / 50  # five levels of eight bits, 1300 of sixteen
    levels = np.round(gentle * 65535).astype(np.uint16)
    other_order, tensor = Image.fromarray(levels.astype(">u2")), torch.from_numpy(gentle)
    for source in (gentle, gentle[..., None], levels, Image.fromarray(levels), other_order, tensor, tensor[None, None]):
        assert np.abs(read_depth(source) - gentle).max() < 1e-4
    turned = Image.fromarray(levels)
    turned.getexif()[0x0112] = 6  # a photo that lies on its side
    assert np.abs(read_depth(turned) - np.rot90(gentle, -1)).max() < 1e-4
    coarse = np.round(gentle * 255).astype(np.uint8)
    assert np.abs(read_depth(coarse) - gentle).max() > 1e-3
    assert np.array_equal(read_depth(Image.fromarray(coarse).convert("RGB")), read_depth(coarse))


def test_files_of_sixteen_bits(tmp_path: Path) -> None:
    levels = np.round(slope(axis=0) * 65535).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    assert np.array_equal(np.asarray(normals(tmp_path / "depth.png", "none")), np.asarray(normals(levels, "none")))
    with pytest.raises(ValueError, match="depth map: there is no file"):
        normals(tmp_path / "missing.png", "none")


def test_a_depth_map_at_another_size() -> None:
    detect = Normals("none", detect_resolution=40)
    made = directions(detect(slope(160, 200, axis=0)))
    assert made.shape == (160, 200, 3)
    assert np.abs(made[60:100, 60:140] - np.array([0, 1, 1]) / np.sqrt(2)).max() < 0.03


def test_estimated_depth(tmp_path: Path) -> None:
    folder = str(save_depth(tmp_path))
    photo = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    detect = Normals(folder)
    made = np.asarray(detect(photo))
    assert np.array_equal(made, np.asarray(Normals("none")(Depth(folder).values(photo))))
    assert len(np.unique(made)) > 50
    detect.unload()
    assert "network" not in vars(detect)


def test_without_a_connection() -> None:
    with pytest.raises(OSError, match=r'Depth-Anything.*model="toybox"'):
        normals(np.zeros((8, 8, 3), np.uint8))
