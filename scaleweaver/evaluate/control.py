"""Control fidelity: how much of a control image is found again in the picture.

Canny F1 follows the protocol of ControlNet++ (arXiv 2404.07987): edges are extracted from the picture with the
control's own thresholds and compared pixel by pixel. A shift of one pixel already costs a strict score more than half
of its value, so scores that tolerate 1 and 2 pixels (Chebyshev distance) stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def edge_f1(found: NDArray[np.bool_], wanted: NDArray[np.bool_], tolerance: int = 0) -> float:
    """F1 of two edge maps (H, W); an edge pixel counts as matched within `tolerance` pixels. Two empty maps score 1."""
    if found.shape != wanted.shape or found.ndim != 2:
        raise ValueError(f"edge maps of shape {found.shape} and {wanted.shape}; expected two (H, W) maps of one size")
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = _near(wanted, tolerance)[found].mean()
    recall = _near(found, tolerance)[wanted].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def canny_f1(picture: Image, edges: Image, *, low: float = 100, high: float = 200) -> Mapping[str, float]:
    """Strict, 1-pixel and 2-pixel F1 of a picture (H, W, 3) uint8 against the canny map (H, W[, 3]) behind it."""
    wanted = (edges if edges.ndim == 2 else edges[..., 0]) > 127
    found = cv2.Canny(np.ascontiguousarray(picture), low, high) > 0
    return {name: edge_f1(found, wanted, t) for name, t in (("f1", 0), ("f1_1px", 1), ("f1_2px", 2))}


def psnr(picture: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    error = np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def _near(edges: NDArray[np.bool_], tolerance: int) -> NDArray[np.bool_]:
    if tolerance == 0:
        return edges
    size = 2 * tolerance + 1
    return cv2.dilate(edges.astype(np.uint8), np.ones((size, size), np.uint8)) > 0
