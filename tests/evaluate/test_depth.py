"""Depth errors against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from scaleweaver.evaluate.depth import align, depth_errors
from scaleweaver.toybox.dataset import draw_batch
from scaleweaver.toybox.drawing import depth_map


def ramp(low: float, high: float, width: int = 1000) -> np.ndarray:
    """Columns that rise evenly, two rows."""
    return np.tile(np.linspace(low, high, width), (2, 1))


def test_a_perfect_map_has_no_error_under_any_scale_and_shift():
    wanted = ramp(0, 1)
    for found in (wanted, 3 * wanted + 7, 0.01 * wanted - 2):
        errors = depth_errors(found, wanted)
        assert errors["rmse"] == pytest.approx(0, abs=1e-9) and errors["rmse_unit"] == pytest.approx(0, abs=1e-9)


def test_the_legacy_normalisation_costs_a_perfect_ramp_from_1_to_5_29_levels():
    """x / max leaves 0.2..1 where min-max makes 0..1: a difference of 51 (1 - t), whose square has the mean 867."""
    wanted = ramp(0, 1)
    errors = depth_errors(4 * wanted + 1, wanted)
    assert errors["rmse_legacy"] == pytest.approx(29.4, abs=0.1)
    assert errors["rmse_legacy"] ** 2 == pytest.approx(867, abs=3)
    assert errors["rmse"] == pytest.approx(0, abs=1e-9)
    assert depth_errors(wanted, wanted)["rmse_legacy"] == 0.0


def test_errors_by_hand():
    """A quarter of the picture is wrong by w: 0 0 0 1 is wanted, a checkerboard-free guess says 0 0 1 1."""
    wanted, found = np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    # least squares: slope cov/var = 0.125 / 0.25 = 0.5, so 0, 0, 0.5, 0.5; errors 0, 0, 0.5, -0.5
    np.testing.assert_allclose(align(found, wanted), [[0, 0], [0.5, 0.5]])
    errors = depth_errors(found, wanted)
    assert errors["rmse_unit"] == pytest.approx(0.125**0.5) and errors["rmse"] == pytest.approx(255 * 0.125**0.5)
    assert errors["rmse_legacy"] == pytest.approx(255 * 0.5)


def test_near_and_far_in_exchange_are_no_match():
    wanted = ramp(0, 1)
    inverted, constant = depth_errors(1 - wanted, wanted), depth_errors(np.full_like(wanted, 0.3), wanted)
    assert inverted["rmse_unit"] == constant["rmse_unit"] == pytest.approx(wanted.std())


def test_true_depth_matches_its_own_map_and_not_that_of_another_scene():
    depths = draw_batch("test", range(4), size=32).depth.numpy()
    maps = [depth_map(depth) for depth in depths]  # uint8, as adapters are given it
    own = [depth_errors(np.where(np.isfinite(d), 1 / d, 0), m)["rmse"] for d, m in zip(depths, maps, strict=True)]
    other = [depth_errors(maps[i], maps[i ^ 1])["rmse"] for i in range(4)]
    assert max(own) < 15 < 40 < min(other)


def test_what_cannot_be_compared_is_refused():
    wanted = ramp(0, 1)
    with pytest.raises(ValueError, match=r"two \(H, W\) maps of one size"):
        depth_errors(wanted[:1], wanted)
    with pytest.raises(ValueError, match="NaN or infinite"):
        depth_errors(np.full_like(wanted, np.inf), wanted)
    with pytest.raises(ValueError, match=r"lies in 0\.\.2"):
        depth_errors(wanted, 2 * wanted)
