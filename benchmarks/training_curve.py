"""The training of the built-in model as a figure: reconstructions, bit loss, and what each control gains.

python benchmarks/training_curve.py tokenizer=RUN/metrics.csv backbone=RUN/metrics.csv controls=RUN/metrics.csv \
    --into scaleweaver/assets/toybox/README.md
python benchmarks/training_curve.py        # the figure again, from the compact table

Stages come one after the other, in the order in which they are named. The table keeps every value measured on the
validation split, and the training loss as means over a hundredth of its stage.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from proof.documents import fill, places

TABLE = Path(__file__).parent / "results" / "toybox-curve.csv"
FIGURE = Path(__file__).parents[1] / "scaleweaver" / "assets" / "toybox" / "images" / "training.png"
POINTS = 100  # of the training loss, per stage
SCALE = 2  # pixels of the figure per unit of its layout
WIDTH, HEIGHT, LEFT, TOP, GAP = 880, 200, 56, 34, 34  # of a panel, and around it
COLORS = {
    "training": "#9aa5b1", "canny": "#0b6bcb", "depth": "#c2410c", "palette": "#15803d", "pose": "#7c3aed",
}  # fmt: skip
INK, PALE = "#1f2933", "#e4e7eb"  # everything else, and the lines of the axes

Row = tuple[str, int, str, float]  # stage, step, name, value


@dataclass(frozen=True)
class Panel:
    """One diagram: the values whose names begin so, over the stages that have any."""

    title: str
    names: tuple[str, ...]


PANELS = (
    Panel("reconstruction of the tokenizer, dB (validation)", ("val_psnr",)),
    Panel("bit loss, nats: training, and validation with and without controls", ("loss", "val_loss")),
    Panel("what a control gains on the same pictures, nats (validation)", ("val_gain",)),
)


def read_stage(name: str, metrics: Path) -> list[Row]:
    """The rows of a stage's metrics.csv that the figure shows; the training loss only where it is one of bits."""
    with metrics.open(newline="", encoding="utf-8") as opened:
        found = [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(opened)]
    wanted = ("val_psnr", "val_loss", "val_gain")
    rows: list[Row] = [(name, step, metric, value) for step, metric, value in found if metric.startswith(wanted)]
    if not any(metric.startswith("accuracy_") for _, metric, _ in found):
        return rows
    losses = [(step, value) for step, metric, value in found if metric == "loss"]
    size = -(-len(losses) // POINTS)
    for start in range(0, len(losses), max(size, 1)):
        part = losses[start : start + size]
        rows.append((name, part[-1][0], "loss", sum(value for _, value in part) / len(part)))
    return rows


def write_table(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["stage", "step", "name", "value"])
        writer.writerows([stage, step, name, f"{value:.5g}"] for stage, step, name, value in rows)


def read_table(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as opened:
        return [(row["stage"], int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(opened)]


def figure(rows: Sequence[Row]) -> Image.Image:
    """The panels that have values, under each other."""
    panels = [(panel, chosen) for panel in PANELS if (chosen := [r for r in rows if r[2].startswith(panel.names)])]
    if not panels:
        raise ValueError("there is no val_psnr, loss, val_loss or val_gain; pass the metrics.csv files of trainings")
    size = ((WIDTH + LEFT + 150) * SCALE, len(panels) * (HEIGHT + TOP + GAP) * SCALE)
    image = Image.new("RGB", size, "white")
    for number, (panel, chosen) in enumerate(panels):
        _draw_panel(ImageDraw.Draw(image), number * (HEIGHT + TOP + GAP) + TOP, panel.title, chosen)
    return image


def _draw_panel(draw: ImageDraw.ImageDraw, top: int, title: str, rows: Sequence[Row]) -> None:
    """Axes, stages, and one line per name; `top` is the upper edge of the diagram."""
    lengths: dict[str, int] = {}
    for stage, step, _, _ in rows:
        lengths[stage] = max(lengths.get(stage, 1), step)
    starts = {stage: sum(list(lengths.values())[:i]) for i, stage in enumerate(lengths)}
    total = sum(lengths.values())
    low, high = min(value for *_, value in rows), max(value for *_, value in rows)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(stage: str, step: int, value: float) -> tuple[float, float]:
        across, up = (starts[stage] + step) / total, (value - low) / (high - low)
        return (LEFT + WIDTH * across) * SCALE, (top + HEIGHT * (1 - up)) * SCALE

    small, large = (ImageFont.load_default(points * SCALE) for points in (11, 13))
    draw.text((LEFT * SCALE, (top - 22) * SCALE), title, INK, large)
    for value in _ticks(low, high):
        y = place(next(iter(starts)), 0, value)[1]
        draw.line([(LEFT * SCALE, y), ((LEFT + WIDTH) * SCALE, y)], PALE, SCALE)
        draw.text(((LEFT - 6) * SCALE, y), f"{value:g}", INK, small, anchor="rm")
    for stage, length in lengths.items():
        x, bottom = place(stage, 0, low)
        draw.line([(x, top * SCALE), (x, bottom)], INK, SCALE)
        draw.text((x + 4 * SCALE, bottom + 4 * SCALE), f"{stage}, {length} steps", INK, small)
    for number, name in enumerate(dict.fromkeys(row[2] for row in sorted(rows, key=lambda row: row[2]))):
        legend = _legend(name)
        color = COLORS.get(legend, INK)
        for stage in lengths:
            points = [place(s, step, value) for s, step, n, value in rows if s == stage and n == name]
            if len(points) > 1:
                draw.line(points, color, 2 * SCALE, joint="curve")
            if name.startswith("val_"):
                for x, y in points:
                    draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], color)
        draw.text(((LEFT + WIDTH + 10) * SCALE, (top + 16 * number) * SCALE), legend, color, small)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends, three to seven."""
    base = 10.0 ** math.floor(math.log10(high - low))
    step = next(base * share for share in (0.2, 0.5, 1.0, 2.0) if (high - low) / (base * share) < 7)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _legend(name: str) -> str:
    if name == "loss":
        return "training"
    kind = name.removeprefix("val_").removeprefix("loss").removeprefix("gain").strip("_")
    return {"": "validation", "psnr": "PSNR", "without": "without control"}.get(kind, kind)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="NAME=METRICS", help="without any, those of the table")
    parser.add_argument("--table", type=Path, default=TABLE, help="the compact table")
    parser.add_argument("--out", type=Path, default=FIGURE, help="PNG")
    parser.add_argument("--into", type=Path, action="append", default=[], help="documents with a place <!-- curve -->")
    options = parser.parse_args(arguments)
    stages = [entry.partition("=") for entry in options.stages]
    for name, equals, path in stages:
        if not equals or not Path(path).is_file():
            parser.error(f"{name}{equals}{path} names no file; write NAME=FOLDER/metrics.csv")
    for document in options.into:
        try:
            places(document, ["curve"])
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if stages:
        write_table(options.table, [row for name, _, path in stages for row in read_stage(name, Path(path))])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure(read_table(options.table)).quantize(64).save(options.out, optimize=True)
    for document in options.into:
        link = os.path.relpath(options.out, document.parent)
        what = "Reconstruction, bit loss and gain of the controls over the steps of the stages named below"
        fill(document, {"curve": f"![{what}]({link})"})
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
