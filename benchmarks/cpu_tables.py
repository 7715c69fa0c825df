"""The results of cpu.py as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def tables(report: dict[str, Any]) -> str:
    """Targets first, then ratios, then where the time of one picture goes, then memory."""
    where = report["machine"]
    parts = [
        f"{where['processor']}, threads: {where['threads']}, torch {where['versions']['torch']}; load average before:"
        f" {', '.join(map(str, where['load_average'] or ()))}. `{report['command']}`",
        _table(
            ("target", "aim", "measured", "reached"),
            [
                (
                    one["target"],
                    one["aim"],
                    _or_dash(one["measured"]),
                    {True: "yes", False: "no"}.get(one["reached"], "-"),
                )
                for one in report["targets"]
            ],
        ),
        *_compared(report),
        *_pictures(report),
    ]
    if report.get("cold_generate"):
        cold = report["cold_generate"]
        parts.append(
            f"`scaleweaver generate` under a control, from the start of the process to the written picture: median "
            f"{cold['median']:.2f} s, best {cold['min']:.2f} s of {cold['runs']} runs with a warm file cache."
        )
    if report["peaks"]:
        rows = [
            (
                one["model"],
                one["way"],
                *(f"{one[f'{name}_bytes'] / 2**20:.0f}" for name in ("imports", "loaded", "peak")),
            )
            for one in report["peaks"]
        ]
        head = ("model", "way", "after imports, MiB", "model loaded, MiB", "after a picture, MiB")
        parts.append("Largest resident set, each in a process of its own:\n\n" + _table(head, rows))
    if report["skipped"]:
        parts.append("Not measured for lack of time: " + "; ".join(report["skipped"]) + ".")
    return "\n\n".join(parts)


def _compared(report: dict[str, Any]) -> Iterator[str]:
    for one in report["compared"]:
        rows = [
            (way, f"{found['times_faster']:.2f}x", *_seconds(found, "total"), found["repeats"])
            for way, found in one["ways"].items()
        ]
        head = (f"{one['model']}: {one['what']}", "times faster", "best, s", "median, s", "runs")
        yield _table(head, rows)


def _pictures(report: dict[str, Any]) -> Iterator[str]:
    for model in dict.fromkeys(one["model"] for one in report["pictures"]):
        for controlled in (False, True):
            shown = [one for one in report["pictures"] if (one["model"], one["controlled"]) == (model, controlled)]
            if shown:
                under = "under canny" if controlled else "no control"
                head = (f"{model}: one picture, {under}", *(f"{one['way']}, median s" for one in shown))
                rows = [(stage, *(_seconds(one, stage)[1] for one in shown)) for stage in shown[0]["stages"]]
                yield _table(head, rows)


def _seconds(found: dict[str, Any], stage: str) -> tuple[str, str]:
    times = found["stages"][stage]
    return f"{times['min']:.3f}", f"{times['median']:.3f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_into(document: Path, name: str, text: str) -> None:
    """Put the text between <!-- name --> and <!-- /name -->."""
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, mark, rest = document.read_text(encoding="utf-8").partition(opening)
    _, end, after = rest.partition(closing)
    if not mark or not end:
        raise ValueError(f"{document} has no place for the tables; write <!-- {name} --> and <!-- /{name} --> into it")
    document.write_text(f"{before}{mark}\n{text}\n\n{end}{after}", encoding="utf-8")
