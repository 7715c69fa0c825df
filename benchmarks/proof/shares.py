"""Shares of right facts with standard errors, over scenes that may weigh differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Facts = Mapping[str, Sequence[bool]]
Figure = tuple[float, float | None]  # a mean and its standard error


def found(pictures: Sequence[Facts], weights: Sequence[float] | None = None) -> dict[str, Any]:
    """{"pictures", name, name_error}: the share of right facts by name; names of which nothing was asked are left out.

    The facts of one picture are not independent, so the error is that of a ratio of sums over pictures.
    """
    result: dict[str, Any] = {"pictures": len(pictures)}
    for name in dict.fromkeys(name for each in pictures for name in each):
        right = np.array([sum(each.get(name, ())) for each in pictures], float)
        asked = np.array([len(each.get(name, ())) for each in pictures], float)
        if (figure := ratio(right, asked, weights)) is not None:
            result[name], result[f"{name}_error"] = figure
    return result


def ratio(right: Any, asked: Any, weights: Sequence[float] | None = None) -> Figure | None:
    """sum(w right) / sum(w asked), and its standard error by linearisation; None where nothing was asked."""
    right, asked = np.asarray(right, float), np.asarray(asked, float)
    w = np.ones(len(right)) if weights is None else np.asarray(weights, float)
    total = float((w * asked).sum())
    if total == 0:
        return None
    share = float((w * right).sum() / total)
    rest = w * (right - share * asked)
    n = int((w * asked > 0).sum())
    return share, float(np.sqrt((rest**2).sum() * n / (n - 1)) / total) if n > 1 else None


def alike(asked: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[float]:
    """Weights under which the scenes `asked` are made up as `others` are: by number of items and people among them.

    A scene of many items is more likely to hold a held-out combination and is harder whether it holds one or not.
    """
    own, wanted = Counter(map(_make_up, asked)), Counter(map(_make_up, others))
    return [wanted[kind] / len(others) * len(asked) / own[kind] for kind in map(_make_up, asked)]


def _make_up(asked: Mapping[str, Any]) -> tuple[int, bool]:
    return len(asked["items"]), any(item["type"] == "person" for item in asked["items"])


def difference(one: Figure, other: Figure) -> Figure:
    """one - other of independent samples."""
    errors = one[1], other[1]
    return one[0] - other[0], None if None in errors else float(np.hypot(*errors))  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> Figure:
    """Mean and standard error."""
    each = np.asarray(values, float)
    return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None
