"""What reads a kind of map out of a picture, and the scores of what it read against what was asked for.

A meter must not be the network that drew the picture, and it makes mistakes of its own: its scores on the true pictures
belong beside every number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from scaleweaver.evaluate.control import edge_f1, map_errors, similarity, stacked_f1
from scaleweaver.evaluate.depth import depth_errors
from scaleweaver.evaluate.pose import pose_scores, pose_summary

Pixels = NDArray[np.uint8]
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One number of a table: its name in files, what people call it, and which way is better."""

    name: str
    title: str
    higher: bool
    digits: int = 3
    note: str = ""


@dataclass(frozen=True)
class Meter:
    """`read` pictures (B, H, W, 3), `compare` what was found in one with its target, `summarise` many comparisons.

    `source` says what does the reading, for reports and for noticing that it changed. `main` is the column by which
    single pictures are ranked. Groups are the pictures of one prompt.
    """

    kind: str
    source: str
    columns: tuple[Column, ...]
    main: str
    read: Callable[[Pixels], Sequence[Any]]
    compare: Callable[[Any, Any], dict[str, Any]]
    summarise: Callable[[Sequence[Sequence[Scores]]], dict[str, float | None]]

    def measure(self, pictures: Pixels, targets: Sequence[Any]) -> list[dict[str, Any]]:
        """Scores of pictures (B, H, W, 3) against B targets."""
        return [self.compare(found, target) for found, target in zip(self.read(pictures), targets, strict=True)]


def edge_meter(low: float = 100, high: float = 200) -> Meter:
    """Canny edges by OpenCV with the thresholds of the control; targets are edge maps (H, W, 3)."""
    columns = (
        Column("f1", "F1", True, note="strict, pixel by pixel"),
        Column("f1_1px", "F1, 1 px", True, note="edges may lie one pixel off"),
        Column("f1_2px", "F1, 2 px", True, note="edges may lie two pixels off"),
        Column("f1_stacked", "F1, stacked", True, note="strict, all images of a prompt taken as one map"),
    )

    def read(pictures: Pixels) -> list[NDArray[np.bool_]]:
        return [cv2.Canny(np.ascontiguousarray(picture), low, high) > 0 for picture in pictures]

    def compare(found: NDArray[np.bool_], target: Pixels) -> dict[str, Any]:
        wanted = target[..., 0] > 127
        scores = {name: edge_f1(found, wanted, t) for name, t in (("f1", 0), ("f1_1px", 1), ("f1_2px", 2))}
        return scores | {"pixels": [int((found & wanted).sum()), int(found.sum()), int(wanted.sum())]}

    def summarise(groups: Sequence[Sequence[Scores]]) -> dict[str, float | None]:
        stacked = [[{"f1_stacked": stacked_f1(one["pixels"] for one in group)}] for group in groups]
        summary = means(groups, ("f1", "f1_1px", "f1_2px"))
        return summary | (means(stacked, ("f1_stacked",)) if max(map(len, groups), default=0) > 1 else {})

    return Meter("canny", f"opencv canny {low:g}/{high:g}", columns, "f1_1px", read, compare, summarise)


def depth_meter(read: Callable[[Pixels], Sequence[Any]], source: str) -> Meter:
    """Depth by a network; targets are inverse depth (H, W), uint8 or floats in [0, 1]."""
    columns = (
        Column("rmse", "RMSE", False, 1, "of 255 levels, after the best scale and shift"),
        Column("rmse_unit", "RMSE, 0..1", False, 4, "the same in units of the whole range"),
        Column("rmse_legacy", "RMSE, legacy", False, 1, "of 255 levels, ControlNet++: not 0 for a perfect map"),
    )
    return Meter("depth", source, columns, "rmse", read, depth_errors, _means_of(columns))


def pose_meter(read: Callable[[Pixels], Sequence[Any]], source: str, *, area_factor: float = 1.0) -> Meter:
    """Key points by a network; targets are (people, 18, 3). `area_factor`: see `pose.oks`."""
    columns = (
        Column("pck", "PCK@0.1", True, note="joints within a tenth of the person's height"),
        Column("ap", "AP", True, note="average precision, OKS .50:.95"),
        Column("ap50", "AP .50", True, note="average precision, OKS .50"),
        Column("ap75", "AP .75", True, note="average precision, OKS .75"),
        Column("count_error", "people off by", False, 2, "mean |people found - people wanted|"),
    )

    def compare(found: Any, target: Any) -> dict[str, Any]:
        return pose_scores(found, target, area_factor=area_factor)

    def summarise(groups: Sequence[Sequence[Scores]]) -> dict[str, float | None]:
        return means(groups, ("pck", "count_error")) | pose_summary([one for group in groups for one in group])

    return Meter("pose", source, columns, "pck", read, compare, summarise)


def map_meter(kind: str, detect: Callable[[Any], Any], source: str, *, shortest: int = 0) -> Meter:
    """Any map by its own preprocessor, made from the picture again; targets are such maps (H, W, 3).

    Structural similarity is added where torchmetrics is installed, and the multi-scale one too where the `shortest`
    side is above 160 pixels.
    """
    columns = [Column("mse", "MSE", False, 0, "of 255 levels"), Column("rmse", "RMSE", False, 1, "of 255 levels")]
    if find_spec("torchmetrics") is not None:
        columns.append(Column("ssim", "SSIM", True, note="structural similarity"))
        if shortest > 160:
            columns.append(Column("ms_ssim", "MS-SSIM", True, note="over five scales"))
    scales = {column.name: {"ssim": 1, "ms_ssim": 5}[column.name] for column in columns[2:]}

    def read(pictures: Pixels) -> list[Pixels]:
        return [np.asarray(detect(picture)) for picture in pictures]

    def compare(found: Pixels, target: Pixels) -> dict[str, Any]:
        return map_errors(found, target) | {name: similarity(found, target, scales=n) for name, n in scales.items()}

    return Meter(kind, source, tuple(columns), "rmse", read, compare, _means_of(columns))


def means(groups: Sequence[Sequence[Scores]], names: Sequence[str]) -> dict[str, float | None]:
    """{name: mean, name_error: its standard error}: first over the pictures of a prompt, then over prompts.

    What a picture has no value of is left out; without any the mean is None, and an error needs two prompts.
    """
    summary: dict[str, float | None] = {}
    for name in names:
        each = [[one[name] for one in group if one.get(name) is not None] for group in groups]
        values = np.array([np.mean(group) for group in each if group], np.float64)
        summary[name] = float(values.mean()) if len(values) else None
        summary[f"{name}_error"] = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return summary


def _means_of(columns: Sequence[Column]) -> Callable[[Sequence[Sequence[Scores]]], dict[str, float | None]]:
    names = [column.name for column in columns]
    return lambda groups: means(groups, names)
