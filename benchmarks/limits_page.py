"""The tables and the figure of limits.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCALES = tuple(
    "1 scale" if n == 1 else f"{n} scales" for n in range(7)
)  # rows named after how many scales are true, or kept
FACTS = {"kind": "things found", "color": "their colours", "count": "number right", "relation": "relations",
         "pose": "poses", "clothes": "clothes", "all": "everything right"}  # fmt: skip
LINES = ("kind", "color", "relation", "all")  # of the figure


def table(report: Mapping[str, Any]) -> str:
    """The report as markdown."""
    settings, found = report["settings"], report["parts"]
    versions = report["machine"]["versions"]
    lines = [
        f"Scenes of the validation split; {settings['model']['processor']}, torch {versions['torch']}. ± is one"
        " standard error over pictures.",
        "",
        "```bash",
        *dict.fromkeys(report["commands"].values()),
        "```",
    ]
    writers = {"prefix": _prefix, "sampling": _sampling, "kept": _kept, "fit": _fit}
    writers |= {"tokenizers": _tokenizers, "backbones": _backbones}
    for name, write in writers.items():
        if found.get(name):
            lines += ["", *write(found[name], settings)]
    return "\n".join(lines) + "\n"


def _prefix(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    lines = [f"### True scales first, the rest drawn: {settings['prefix']['count']} scenes", ""]
    groups = [name for name in rows[SCALES[0]] if name != "all"] if SCALES[0] in rows else []
    lines += _head("the first", [*FACTS.values(), *(f"found, of {name}" for name in groups)])
    for name, row in rows.items():
        cells = [_cell(row["all"], fact) for fact in FACTS] + [_cell(row.get(group, {}), "kind") for group in groups]
        lines.append(_line(name, cells))
    return lines


def _sampling(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    call, facts = settings["model"]["call"], ("kind", "color", "relation", "count")
    shipped = ", ".join(f"{name} {call[name]}" for name in ("guidance_scale", "temperature", "top_p"))
    lines = [f"### Other settings of a call: {settings['sampling']['count']} scenes (as shipped: {shipped})", ""]
    lines += _head("", [FACTS[fact] for fact in facts] + [f"change of {FACTS[fact]}" for fact in facts[:2]])
    for name, row in rows.items():
        changes = [_cell(row, f"{fact}_change", sign=True) for fact in facts[:2]]
        lines.append(_line(name, [*(_cell(row, fact) for fact in facts), *changes]))
    return lines


def _kept(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    lines = [f"### The tokenizer with its first scales alone: {settings['kept']['count']} scenes", ""]
    lines += _head("kept", FIDELITY)
    return lines + [_line(name, _fidelity(row)) for name, row in rows.items()]


FIDELITY = ("PSNR (dB)", "canny F1, 1 px", "people found", "error of joints (px)")


def _fidelity(row: Mapping[str, Any]) -> list[str]:
    digits = {"psnr": 2, "f1_1px": 3, "person": 2, "joints_px": 2}
    return [_cell(row, name, digits=d) for name, d in digits.items()]


def _fit(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    count = settings["fit"]["held_out"]
    lines = [f"### Is the shipped model better on the pictures it learned from? {count} pictures each", ""]
    scales = len(next(iter(rows.values()))["scales"])
    lines += _head("loss in nats a bit", ["all scales", *(f"scale {n + 1}" for n in range(scales)), "right bits"])
    for name, row in rows.items():
        lines.append(_line(name, [_cell(row, "loss", 4), *(f"{v:.3f}" for v in row["scales"]), _cell(row, "right", 4)]))
    return lines


def _tokenizers(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    short = settings["tokenizers"]
    lines = [f"### Short trainings of the tokenizer, {short['steps']} steps of {short['batch']}", ""]
    lines += _head("", ["bits a picture", "parameters", "images/s", *FIDELITY, "change of PSNR"])
    for name, row in rows.items():
        cells = [f"{row['bits_a_picture']:,}", f"{row['parameters'] / 1e6:.2f} M", _rate(row)]
        lines.append(_line(name, [*cells, *_fidelity(row), _cell(row, "psnr_change", 2, sign=True)]))
    return lines


def _backbones(rows: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    short = settings["backbones"]
    lines = [f"### Short trainings of the backbone, {short['steps']} steps of {short['batch']}", ""]
    scales = len(next(iter(rows.values()))["averaged"]["scales"])
    columns = ["parameters", "GFLOP", "images/s", "held-out loss", "change", "of the last weights"]
    columns += ["on a history with mistakes", *(f"scale {n + 1}" for n in range(scales))]
    lines += _head("", columns)
    for name, row in rows.items():
        averaged = row["averaged"]
        cells = [f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.2f}", _rate(row), f"{averaged['loss']:.4f}"]
        cells += [_cell(averaged, "loss_change", 4, sign=True), f"{row['last']['loss']:.4f}"]
        cells += [f"{row['mistaken history']['loss']:.4f}", *(f"{value:.3f}" for value in averaged["scales"])]
        lines.append(_line(name, cells))
    if spread := seed_spread(rows):
        lines += ["", f"The {spread[1]} baselines differ by their seed alone: standard deviation {spread[0]:.4f}."]
    return lines


def seed_spread(rows: Mapping[str, Any]) -> tuple[float, int] | None:
    """Standard deviation of the held-out losses of the baselines, and how many there are, if there are two."""
    losses = [row["averaged"]["loss"] for name, row in rows.items() if name.startswith("baseline")]
    return (float(np.std(losses, ddof=1)), len(losses)) if len(losses) > 1 else None


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(row: Mapping[str, Any], name: str, digits: int = 2, *, sign: bool = False) -> str:
    value, error = row.get(name), row.get(f"{name}_error")
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _rate(row: Mapping[str, Any]) -> str:
    return "-" if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"


def chart(rows: Mapping[str, Any], path: Path) -> None:
    """What the judge finds against the number of true scales: by what is asked, and by the number of things."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'the figure needs matplotlib ({error}); run pip install "scaleweaver[dev]"') from error
    numbers = [number for number, name in enumerate(SCALES) if name in rows]
    groups = [name for name in rows[SCALES[numbers[0]]] if name != "all"]
    lines = [[(FACTS[fact], "all", fact) for fact in LINES], [(f"of {name}", name, "kind") for name in groups]]
    figure = Figure(figsize=(8.4, 3.6), dpi=160, layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), ("all scenes", "things found in scenes"), lines, strict=True)
    for axes, title, panel in panels:
        for label, group, fact in panel:
            cells = [rows[SCALES[number]].get(group, {}) for number in numbers]
            values, errors = ([_known(cell, name) for cell in cells] for name in (fact, f"{fact}_error"))
            axes.errorbar(numbers, values, errors, label=label, marker="o", markersize=4, capsize=3)
        axes.set(title=title, xlabel="scales taken from the true picture, of 6", ylim=(0, 1), xticks=numbers)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    figure.axes[0].set_ylabel("share found right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _known(cell: Mapping[str, Any], name: str) -> float:
    """The number of a cell; nan, which is not drawn, where nothing was asked."""
    value = cell.get(name)
    return np.nan if value is None else float(value)
