"""The report as markdown: all of it for the model card, the targets alone for the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proof.evaluation import FIVE
from proof.targets import LOSS, NAMES, control_loss, lookup, losses, shown, target_table
from scaleweaver.evaluate.attributes import FACTS
from scaleweaver.evaluate.report import markdown

EDGES = ("f1", "f1_1px", "f1_2px")
Report = Mapping[str, Any]


def documents(report: Report, earlier: Report | None = None) -> dict[str, str]:
    """What stands in documents, by the name of its place."""
    if earlier is not None and earlier["settings"]["weights"] == report["settings"]["weights"]:
        earlier = None  # nothing to compare with
    return {"measured": everything(report, earlier), "targets": f"{_where(report)}\n\n{_targets(report, earlier)}"}


def everything(report: Report, earlier: Report | None) -> str:
    """All tables, targets first."""
    parts = report["parts"]
    commands = dict.fromkeys(report["commands"][name] for name in parts)
    lines = [_where(report), "", "```bash", *commands, "```", "", _targets(report, earlier, bounds=True), ""]
    for name, table in TABLES.items():
        if parts.get(name):
            lines += table(parts[name])
    return "\n".join(lines)


def _where(report: Report) -> str:
    settings, machine = report["settings"], report["machine"]
    place = f"{settings['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}"
    return f"{settings['count']} scenes of the {settings['split']} split; {place}"


def _targets(report: Report, earlier: Report | None, *, bounds: bool = False) -> str:
    text = target_table(report, earlier, bounds=bounds)
    judges = {lookup(each["parts"], "attributes", "judge") for each in (report, earlier) if each is not None}
    if len(judges - {None}) > 1:
        text += "\n\nThe facts of the earlier weights were read by another judge."
    return text


def _tokenizer(part: Report) -> list[str]:
    lines = ["| tokenizer | PSNR (dB) | canny F1 | F1, 1 px | F1, 2 px |", "|---|---|---|---|---|"]
    return [*lines, f"| reconstruction | {part['psnr']:.2f} | " + _row(part[e] for e in EDGES), ""]


def _bits(part: Report) -> list[str]:
    named = {name: values for name, values in part.items() if isinstance(values, list)}
    scales = len(next(iter(named.values())))
    lines = ["| right bits given | " + " | ".join(f"scale {i + 1}" for i in range(scales)) + " |"]
    return [*lines, "|---" * (scales + 1) + "|", *(f"| {name} | {_row(values)}" for name, values in named.items()), ""]


def _control(part: Report) -> list[str]:
    lines = []
    for kind, each in part.items():
        heading, *rows = markdown(each).splitlines()
        lines += [heading.replace("| |", f"| {kind}, {each['meter']} |", 1), *rows, ""]
    return lines


def _blazepose(part: Report) -> list[str]:
    return _control({"pose": part})


def _attributes(part: Report) -> list[str]:
    """Facts without ground and sky carry their standard errors."""
    named = {name: values for name, values in part.items() if isinstance(values, Mapping)}
    asked = [name for name in (*FACTS, "all five") if any(name in values for values in named.values())]
    titles = [NAMES.get(name, name) for name in asked]
    lines = ["| found by the judge | " + " | ".join(titles) + " |", "|---" * (len(asked) + 1) + "|"]
    for row, values in named.items():
        lines.append(f"| {row} | " + " | ".join(_cell(values, name) for name in asked) + " |")
    return [*lines, ""]


def _heldout(part: Report) -> list[str]:
    """Seen and held-out combinations, differences in the last rows."""
    rows = part["attributes"]
    control, parts = part.get("control"), {"heldout": part}
    asked = [name for name in (*FIVE, "all five") if any(name in row for row in rows.values())]
    heads = [NAMES.get(name, name) for name in asked]
    extra = [f"{control['kind']} {control['column']['title']}"] if control else []
    lines = ["| held-out combinations | scenes | " + " | ".join([*heads, *extra]) + " |"]
    lines += ["|---" * (len(asked) + 2 + len(extra)) + "|"]
    for name, row in rows.items():
        cells = [_cell(row, fact) for fact in asked]
        which = name.partition(", ")[2]
        if control:
            cells.append(shown(control[which]) if name.startswith("prompt") else "-")
        lines.append(f"| {name} | {row['pictures']} | " + " | ".join(cells) + " |")
    for facts in ("true renders", "prompt alone"):
        lost = losses(parts, facts)
        cells = [shown(lost[fact]) if fact in lost else "-" for fact in asked]
        if control:
            cells.append(shown(control_loss(parts)) if facts == "prompt alone" else "-")
        lines.append(f"| {facts}: difference | | " + " | ".join(cells) + " |")
    note = (
        f"Seen combinations are weighed to have as many items and people as the held-out ones; {LOSS:.2f} may be lost."
    )
    return [*lines, "", note, ""]


def _size(part: Report) -> list[str]:
    return ["| weights | " + " | ".join(part) + " |", "|---" * (len(part) + 1) + "|",
            "| MB | " + " | ".join(f"{value:.1f}" for value in part.values()) + " |", ""]  # fmt: skip


def _speed(part: Report) -> list[str]:
    named = {name: values for name, values in part.items() if isinstance(values, Mapping)}
    lines = [f"| one picture, {part['threads']} threads | median, s | fastest, s |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {v['seconds']:.2f} | {v['fastest']:.2f} |" for name, v in named.items()), ""]


def _cell(values: Mapping[str, Any], name: str) -> str:
    return "-" if values.get(name) is None else shown((values[name], values.get(f"{name}_error")))


def _row(values: Iterable[float | None]) -> str:
    return " | ".join("-" if value is None else f"{value:.3f}" for value in values) + " |"


TABLES = {
    "tokenizer": _tokenizer, "bits": _bits, "control": _control, "blazepose": _blazepose,
    "attributes": _attributes, "heldout": _heldout, "size": _size, "speed": _speed,
}  # fmt: skip
