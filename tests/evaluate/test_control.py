"""Scores of control fidelity against cases whose value is known."""

from __future__ import annotations

import numpy as np
import pytest

from scaleweaver.controls import canny
from scaleweaver.evaluate.control import canny_f1, edge_f1, map_errors, psnr, similarity, stacked_f1
from scaleweaver.toybox.dataset import draw_batch


def lines(shift: int = 0) -> np.ndarray:
    """Three thin vertical lines."""
    edges = np.zeros((32, 32), bool)
    edges[:, [6 + shift, 15 + shift, 24 + shift]] = True
    return edges


def test_equal_maps_score_one_and_disjoint_ones_nothing():
    assert edge_f1(lines(), lines()) == 1.0
    far = np.zeros((32, 32), bool)
    far[:, 0] = True
    assert edge_f1(lines(), far, tolerance=2) == 0.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    found, wanted = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    wanted[0] = True  # 4 pixels wanted
    found[0, :2] = found[2, :] = True  # 2 of them found among 6
    precision, recall = 2 / 6, 2 / 4
    assert edge_f1(found, wanted) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_shift_within_the_tolerance_costs_nothing(shift):
    for tolerance in range(4):
        assert edge_f1(lines(shift), lines(), tolerance) == (1.0 if shift <= tolerance else 0.0)


def test_tolerance_is_measured_along_both_axes():
    assert edge_f1(np.roll(lines().T, 1, 0), lines().T, 1) == 1.0
    corner, beside = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    corner[1, 1] = beside[2, 2] = True
    assert edge_f1(corner, beside, 1) == 1.0


def test_empty_maps():
    empty = np.zeros((32, 32), bool)
    assert edge_f1(empty, empty) == 1.0
    assert edge_f1(empty, lines()) == edge_f1(lines(), empty) == 0.0


@pytest.mark.parametrize(("found", "wanted"), [((32, 32), (32, 31)), ((32, 32, 3), (32, 32, 3)), ((32,), (32,))])
def test_shapes_that_do_not_fit_are_refused(found, wanted):
    with pytest.raises(ValueError, match=r"expected two \(H, W\) maps"):
        edge_f1(np.zeros(found, bool), np.zeros(wanted, bool))


def test_canny_f1_of_a_picture_against_its_own_edges_and_against_a_shift():
    picture = draw_batch("test", [2], size=96).images[0].mul(255).byte().permute(1, 2, 0).numpy()  # (H, W, 3)
    edges = np.asarray(canny(picture))
    assert canny_f1(picture, edges) == {"f1": 1.0, "f1_1px": 1.0, "f1_2px": 1.0}
    assert canny_f1(picture, edges[..., 0])["f1"] == 1.0
    shifted = canny_f1(picture, np.roll(edges, (1, 1), axis=(0, 1)))
    assert shifted["f1"] < 0.5 < 0.95 < shifted["f1_1px"] <= shifted["f1_2px"]
    other = canny_f1(picture, edges, low=20, high=40)  # other thresholds find other edges
    assert other["f1"] < 1.0


def test_psnr():
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 51, np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, grey) == psnr(grey, black) == pytest.approx(20 * np.log10(5))


def test_stacked_f1_takes_the_maps_of_a_prompt_as_one():
    # 3 of 4 and 4 found pixels, then 1 of 8 and 2: 2 * 4 / (4 + 4 + 8 + 2)
    assert stacked_f1([(3, 4, 4), (1, 8, 2)]) == pytest.approx(8 / 18)
    assert stacked_f1([(0, 0, 0)]) == 1.0 and stacked_f1([(0, 3, 0)]) == 0.0
    one = np.roll(lines(), 1, 1) | lines()
    counts = int((one & lines()).sum()), int(one.sum()), int(lines().sum())
    assert stacked_f1([counts]) == pytest.approx(edge_f1(one, lines()))


def test_map_errors_are_in_levels():
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 30, np.uint8)
    assert map_errors(black, grey) == {"mse": 900.0, "rmse": 30.0}
    half = grey.copy()
    half[:4] = 0
    assert map_errors(half, black) == {"mse": 450.0, "rmse": pytest.approx(450**0.5)}
    with pytest.raises(ValueError, match="two of one size"):
        map_errors(black, grey[:4])


def test_structural_similarity():
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert similarity(wanted, wanted) == pytest.approx(1.0)
    assert similarity(255 - wanted, wanted) < 0 < similarity(wanted // 2, wanted) < 1
    assert similarity(wanted[..., 0], wanted[..., 0]) == pytest.approx(1.0)
    large = rng.integers(0, 256, (176, 176), np.uint8)
    assert similarity(large, large, scales=5) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="pass 1 or 5"):
        similarity(wanted, wanted, scales=3)
