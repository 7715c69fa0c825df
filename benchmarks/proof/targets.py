"""What the built-in model was meant to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proof.evaluation import FIVE, FULL, HALF
from proof.shares import Figure, difference

Parts = Mapping[str, Any]
Read = Callable[[Parts], Figure | None]
KINDS = ("canny", "depth", "palette", "pose")
NAMES = {"color": "colour"}  # facts as documents call them
LOSS = 0.10  # how much less may be right of held-out combinations
UNSURE = 2.0  # standard errors that a difference must exceed to count as one


@dataclass(frozen=True)
class Target:
    """One line: what is measured, what was wanted in words, and how a report is read and held to it.

    `bound` is the same number of true renders, or of what else no model with this meter and tokenizer could pass.
    """

    name: str
    wanted: str
    read: Read
    reached: Callable[[Parts, float], bool] | None = None
    bound: Read | None = None
    digits: int = 3


def lookup(parts: Parts, *path: str) -> Any:
    """What a report holds there, None if it has not been measured."""
    found: Any = parts
    for name in path:
        if not isinstance(found, Mapping) or found.get(name) is None:
            return None
        found = found[name]
    return found


def _value(*path: str) -> Read:
    """A number, with its standard error if the report has one."""

    def read(parts: Parts) -> Figure | None:
        value = lookup(parts, *path)
        return None if value is None else (value, lookup(parts, *path[:-1], f"{path[-1]}_error"))

    return read


def _control(kind: str, row: str, column: str) -> Read:
    return _value("control", kind, "rows", row, column)


def _times(read: Read, base: Read) -> Read:
    """How many times as much as `base`; the error of `base` is small beside the other and left out."""

    def quotient(parts: Parts) -> Figure | None:
        one, other = read(parts), base(parts)
        if one is None or other is None or other[0] == 0:
            return None
        return one[0] / other[0], None if one[1] is None else one[1] / other[0]

    return quotient


def _least(limit: float) -> Callable[[Parts, float], bool]:
    return lambda _, value: value >= limit


def _most(limit: float) -> Callable[[Parts, float], bool]:
    return lambda _, value: value <= limit


def _half_way(kind: str) -> Target:
    def read(parts: Parts) -> Figure | None:
        share = lookup(parts, "control", kind, "half way", "share")
        return None if share is None else (share, None)

    def between(parts: Parts, _: float) -> bool:
        distances = [parts["control"][kind]["half way"][name] for name in ("from 0", "to 1")]
        return all(error is not None and value > UNSURE * error for value, error in distances)

    return Target(f"{kind} at strength {HALF}: share of the way from 0 to 1", "in between", read, between, digits=2)


def losses(parts: Parts, facts: str = "prompt alone") -> dict[str, Figure]:
    """Share of facts right of held-out combinations less that of seen ones, by name."""
    rows = [lookup(parts, "heldout", "attributes", f"{facts}, {which}") or {} for which in ("held out", "seen")]
    return {
        name: difference(*((row[name], row[f"{name}_error"]) for row in rows))
        for name in (*FIVE, "all five")
        if all(row.get(name) is not None for row in rows)
    }


def _worst_loss(parts: Parts) -> Figure | None:
    found = losses(parts)
    return min((found[name] for name in FIVE if name in found), key=lambda figure: figure[0], default=None)


def control_loss(parts: Parts) -> Figure | None:
    """The main number of a control on held-out scenes less that on seen ones."""
    pair = [lookup(parts, "heldout", "control", which) for which in ("held out", "seen")]
    return None if None in pair else difference(*pair)


_CANNY = _control("canny", f"strength {FULL}", "f1_1px")
_CEILING = _control("canny", "reconstructed reference", "f1_1px")
_NONE = _control("canny", "without control", "f1_1px")
_FREE = ("attributes", "prompt alone")
_TRUE = ("attributes", "true renders")
_METER = "meter on true renders"

TARGETS = (
    Target("tokenizer: PSNR, dB", "at least 30", _value("tokenizer", "psnr"), _least(30), digits=2),
    Target("tokenizer: canny F1, 1 px", "at least 0.85", _value("tokenizer", "f1_1px"), _least(0.85)),
    *(
        Target(
            f"prompt alone: {NAMES.get(name, name)} right", "at least 0.85",
            _value(*_FREE, name), _least(0.85), _value(*_TRUE, name),
        )
        for name in (*FIVE, "all five")
    ),
    Target("canny F1, 1 px, of its ceiling", "at least 0.85", _times(_CANNY, _CEILING), _least(0.85)),
    Target("canny F1, 1 px, times that without control", "at least 3", _times(_CANNY, _NONE), _least(3), digits=2),
    Target(
        "depth: aligned RMSE, 0..1", "at most 0.08",
        _control("depth", f"strength {FULL}", "rmse_unit"), _most(0.08), _control("depth", _METER, "rmse_unit"),
    ),
    Target(
        "pose: PCK@0.1 by the estimator", "at least 0.8",
        _control("pose", f"strength {FULL}", "pck"), _least(0.8), _control("pose", _METER, "pck"),
    ),
    *(
        Target(
            f"pose: PCK@0.1 by BlazePose{either}", "as a check",
            _value("blazepose", "rows", f"strength {FULL}", name), None, _value("blazepose", "rows", _METER, name),
        )
        for name, either in (("pck", ""), ("pck_either", ", left and right either way"))
    ),
    *(_half_way(kind) for kind in KINDS),
    *(
        Target(f"held-out less seen combinations, {what}", f"at least -{LOSS:.2f}", read, _least(-LOSS))
        for what, read in (("worst of the five facts", _worst_loss), ("canny F1, 1 px", control_loss))
    ),
    Target(
        "seconds a picture under canny", "under 1 on 2 cores",
        _value("speed", "prompt and canny", "seconds"), lambda parts, value: value < 1, digits=2,
    ),
    Target("weights of all that ships, MB", "under 40", _value("size", "together"), lambda parts, value: value < 40,
           digits=1),
)  # fmt: skip


def target_table(report: Mapping[str, Any], earlier: Mapping[str, Any] | None = None, *, bounds: bool = True) -> str:
    """Target, measured, reached or not; beside it the bound, and what an earlier report of other weights measured."""
    parts = report["parts"]
    heads = ["", "wanted", "measured", "reached", *(["true renders"] if bounds else [])]
    if earlier is not None:
        heads.append(f"earlier weights ({earlier['settings']['count']} scenes)")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for target in TARGETS:
        figure = target.read(parts)
        cells = [target.name, target.wanted, shown(figure, target.digits), _verdict(target, parts, figure)]
        if bounds:
            cells.append("" if target.bound is None else shown(target.bound(parts), target.digits))
        if earlier is not None:
            cells.append(shown(target.read(earlier["parts"]), target.digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(target: Target, parts: Parts, figure: Figure | None) -> str:
    if figure is None or target.reached is None:
        return "-"
    return "yes" if target.reached(parts, figure[0]) else "**no**"


def shown(figure: Figure | None, digits: int = 3) -> str:
    """Mean and standard error of one cell."""
    if figure is None:
        return "not measured"
    value, error = figure
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
