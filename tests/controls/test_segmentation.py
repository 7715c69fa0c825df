"""Classes as colours, by networks that label pixels and by networks that label masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_controls import save_masks, save_segmentation
from transformers.utils import is_scipy_available

from scaleweaver.controls import Segmentation, segmentation
from scaleweaver.controls.segmentation import class_colors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmentation(tmp_path_factory.mktemp("classes"))


def noise(height: int = 47, width: int = 61) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_colours_are_those_of_pascal_voc() -> None:
    # background, aeroplane, bicycle, bird, .., and the last of its 21: tv monitor
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128)}
    assert {index: tuple(class_colors(21)[index].tolist()) for index in known} == known
    assert tuple(class_colors(21)[20].tolist()) == (0, 64, 128)
    assert len(np.unique(class_colors(256), axis=0)) == 256
    assert np.array_equal(class_colors(7), class_colors(150)[:7])


def test_every_pixel_has_the_colour_of_its_class(folder: Path) -> None:
    detect = Segmentation(str(folder))
    classes = detect.classes(noise())
    assert classes.shape == (47, 61) and len(np.unique(classes)) > 1
    assert np.array_equal(np.asarray(detect(noise())), class_colors(7)[classes])
    assert detect.names() == {i: f"LABEL_{i}" for i in range(7)}


def test_the_class_is_what_the_network_says(folder: Path) -> None:
    detect = Segmentation(str(folder))
    with torch.no_grad():
        detect.network[1].decode_head.classifier.bias[5] += 1e4
    assert (detect.classes(noise()) == 5).all()
    assert (np.asarray(detect(noise())) == class_colors(6)[5]).all()


def test_answers_for_large_pictures_stay_small(folder: Path) -> None:
    """At 4 million pixels and 150 classes the probabilities alone would take 2.4 GB."""
    detect = Segmentation(str(folder))
    sizes = []
    processor = detect.network[0]
    original = processor.post_process_semantic_segmentation

    def recorded(outputs: Any, target_sizes: list[tuple[int, int]]) -> Any:
        sizes.extend(target_sizes)
        return original(outputs, target_sizes=target_sizes)

    processor.post_process_semantic_segmentation = recorded
    classes = detect.classes(np.repeat(noise(), 60, axis=0)[:, :40])  # (2820, 40) is small enough
    assert classes.shape == (2820, 40) and sizes.pop() == (2820, 40)
    classes = detect.classes(np.repeat(np.repeat(noise(), 30, axis=0), 40, axis=1))
    assert classes.shape == (1410, 2440) and np.prod(sizes.pop()) == pytest.approx(1e6, rel=0.01)
    assert len(np.unique(classes)) > 1


def test_no_colour_in_between(folder: Path) -> None:
    made = np.asarray(Segmentation(str(folder), detect_resolution=20)(noise(90, 70)))
    assert made.shape == (90, 70, 3)
    assert set(map(tuple, made.reshape(-1, 3).tolist())) <= set(map(tuple, class_colors(7).tolist()))


def test_a_network_of_masks(tmp_path: Path) -> None:
    detect = Segmentation(str(save_masks(tmp_path)))
    if not is_scipy_available():
        with pytest.raises(ValueError, match=r"cannot be loaded: .*scipy.*pip install scipy"):
            detect(noise())
        return
    classes = detect.classes(noise())
    assert classes.shape == (47, 61) and classes.min() >= 0 and classes.max() < 7
    assert np.array_equal(np.asarray(detect(noise())), class_colors(7)[classes])


def test_without_a_connection() -> None:
    with pytest.raises(OSError, match=r"openmmlab/upernet-convnext-small.*Hub.*without the Hub, `palette`"):
        segmentation(noise())
