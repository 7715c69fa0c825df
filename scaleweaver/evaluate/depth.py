"""Depth fidelity: how far the depth found in a picture is from the depth that was asked for.

Depth networks give inverse depth up to an unknown scale and shift, so the error that means something is taken after
fitting both. The normalisation of ControlNet++ (arXiv 2404.07987) stands beside it for comparison with published
numbers: it divides the found map by its maximum but stretches the wanted one from minimum to maximum, so even a perfect
map scores badly there (29.4 of 255 on a ramp from 1 to 5).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating] | NDArray[np.uint8]


def depth_errors(found: Map, wanted: Map) -> dict[str, float]:
    """Root mean square errors of a found map (H, W) against the wanted one, near is large in both.

    "rmse": after `align`, in levels of 0..255 of the wanted map's full range; "rmse_unit": the same in 0..1;
    "rmse_legacy": ControlNet++, in levels of 0..255. `wanted` is uint8, or floats in [0, 1]; of `found` the range is
    free.
    """
    target = _unit(wanted)
    guess = np.asarray(found, np.float64)
    if guess.shape != target.shape or guess.ndim != 2:
        raise ValueError(f"depth maps of shape {guess.shape} and {target.shape}; expected two (H, W) maps of one size")
    if not np.isfinite(guess).all():
        raise ValueError("the found depth holds NaN or infinite values; pass inverse depth, where the sky is 0")
    error = _rms(np.clip(align(guess, target), 0, 1) - target)
    return {"rmse": 255 * error, "rmse_unit": error, "rmse_legacy": _legacy(guess, target)}


def align(found: Map, wanted: Map) -> NDArray[np.float64]:
    """`found` under the scale and shift that bring it closest to `wanted` (least squares over all pixels).

    A negative scale would reward near and far in exchange: then the best constant is returned.
    """
    guess, target = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    centred = guess - guess.mean()
    power = float((centred**2).sum())
    flat = power <= 1e-20 * float((guess**2).sum())  # rounding alone
    scale = 0.0 if flat else max(float((centred * target).sum()) / power, 0.0)
    return scale * centred + target.mean()


def _legacy(guess: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """x / max against min-max, both in 8 bits."""
    span = target.max() - target.min()
    stretched = (target - target.min()) / span if span > 0 else np.zeros_like(target)
    divided = np.clip(guess / guess.max(), 0, 1) if guess.max() > 0 else np.zeros_like(guess)
    return _rms(np.rint(255 * divided) - np.rint(255 * stretched))


def _unit(wanted: Map) -> NDArray[np.float64]:
    if wanted.dtype == np.uint8:
        return wanted.astype(np.float64) / 255
    target = np.asarray(wanted, np.float64)
    if not np.isfinite(target).all() or target.min() < 0 or target.max() > 1:
        raise ValueError(f"the wanted depth lies in {target.min():.3g}..{target.max():.3g}; pass uint8 or floats 0..1")
    return target


def _rms(difference: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(difference**2)))
