"""Control fidelity: how much of a control image is found again in the picture.

Canny F1 follows the protocol of ControlNet++ (arXiv 2404.07987): edges are extracted from the picture with the
control's own thresholds and compared pixel by pixel. A shift of one pixel already costs a strict score more than half
of its value, so scores that tolerate 1 and 2 pixels (Chebyshev distance) stand beside it. Maps with tones are compared
by their error in levels of 0..255, as OminiControl (arXiv 2411.15098) and its successors seem to do, and by structural
similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def stacked_f1(counts: Iterable[Sequence[int]]) -> float:
    """Strict F1 of several edge maps taken as one, as ControlNet++ does with the images of one prompt.

    `counts` are (pixels in both maps, pixels found, pixels wanted) of each.
    """
    hits, found, wanted = (sum(column) for column in zip(*counts, strict=True))
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def map_errors(found: Image, wanted: Image) -> dict[str, float]:
    """Mean square error and its root of two maps (H, W[, 3]) uint8, in levels of 0..255."""
    if found.shape != wanted.shape:
        raise ValueError(f"maps of shape {found.shape} and {wanted.shape}; expected two of one size")
    error = float(np.mean((found.astype(np.float64) - wanted.astype(np.float64)) ** 2))
    return {"mse": error, "rmse": error**0.5}


def similarity(found: Image, wanted: Image, *, scales: int = 1) -> float:
    """Structural similarity of two uint8 maps (H, W[, 3]), up to 1; with 5 `scales` the multi-scale one.

    From torchmetrics (extra "eval"): Gaussian window of 11 pixels, data range 1. Five scales need more than 160 pixels.
    """
    try:
        from torchmetrics.functional import image as metrics
    except ModuleNotFoundError:
        raise ValueError('structural similarity needs torchmetrics; run pip install "scaleweaver[eval]"') from None
    import torch

    if scales not in (1, 5):
        raise ValueError(f"similarity over {scales} scales; pass 1 or 5")
    a, b = (
        torch.from_numpy(np.atleast_3d(m).astype(np.float32) / 255).permute(2, 0, 1)[None] for m in (found, wanted)
    )  # (1, C, H, W)
    measure: Any = metrics.structural_similarity_index_measure
    if scales == 5:
        measure = metrics.multiscale_structural_similarity_index_measure
    return float(measure(a, b, data_range=1.0))


def psnr(picture: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    error = np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def _near(edges: NDArray[np.bool_], tolerance: int) -> NDArray[np.bool_]:
    if tolerance == 0:
        return edges
    size = 2 * tolerance + 1
    return cv2.dilate(edges.astype(np.uint8), np.ones((size, size), np.uint8)) > 0
