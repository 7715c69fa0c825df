"""The report of gpu.py as a page: the targets first, then what they rest on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SIDE = "1024"


def page(report: Mapping[str, Any]) -> str:
    """Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number != "absent")
    lines = [f"# {machine['device']}", "", f"`{report['command']}`", "", f"{versions}.", ""]
    lines += ["", "## Targets", "", *table(("what", "wanted", "measured", "reached"), targets(report))]
    lines += ["", "## Parts", "", *table(("part", "seconds", "outcome"), _outcomes(report))]
    if report.get("lost_in"):
        lines += ["", f"The device was lost in {', '.join(report['lost_in'])}; a new process went on from there."]
    for name, write in {
        "ceilings": _ceilings, "tests": _tests, "checks": _checks, "pointwise": _pointwise,
        "cached_attention": _cached, "training_attention": _training, "pictures": _pictures, "waits": _pairs,
        "same_pictures": _pairs, "decoder": _pairs, "tiles": _pairs, "memory": _pairs,
    }.items():  # fmt: skip
        found = report.get(name)
        if found and not (isinstance(found, Mapping) and set(found) <= {"error", "where", "skipped"}):
            lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", *write(found)]
    return "\n".join(lines) + "\n"


def targets(report: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Rows (what, wanted, measured, reached); what was not measured counts as not reached."""
    rows: list[Sequence[Any]] = []

    def add(what: str, wanted: str, measured: float | None, reached: bool, form: str = "{:.0f}") -> None:
        shown = "not measured" if measured is None else form.format(measured)
        rows.append((what, wanted, shown, "yes" if measured is not None and reached else "no"))

    cases = _list(report.get("pictures"), "cases")
    plain = _fastest(cases, 0, "none")
    total = plain["total_ms"] if plain else None
    add(f"{SIDE}, batch 1, guidance, end to end", "245 ms", total, (total or 0) <= 245, "{:.1f} ms")
    for encoding, most in (("fresh", 0.25), ("reused", 0.08)):
        with_one = _fastest(cases, 1, encoding)
        more = with_one["total_ms"] / total - 1 if with_one and total else None
        add(f"one control, encoding {encoding}", f"at most +{most:.0%}", more, (more or 0) <= most, "{:+.1%}")
    shares = [row["of_copy"] for row in report.get("pointwise") or () if isinstance(row, Mapping) and "of_copy" in row]
    lowest = min(shares, default=None)
    add("slowest pointwise kernel, of copy bandwidth", "at least 70%", lowest, (lowest or 0) >= 0.7, "{:.0%}")
    ways = {
        row["way"]: row["ms"] for row in report.get("training_attention") or ()
        if isinstance(row, Mapping) and row.get("mask") == "block_causal" and row.get("backward") and "ms" in row
    }  # fmt: skip
    others = [ways[name] for name in ("flex", "slices") if name in ways]
    ratio = ways["kernel"] / min(others) if "kernel" in ways and others else None
    add("training attention, time over the best other", "at most 1.10", ratio, (ratio or 9) <= 1.1, "{:.2f}")
    found = report.get("memory")
    peaks = found if isinstance(found, Mapping) else {}
    for name, most in (("everything on the device", 12), ("components one by one", 8)):
        measured = [v["peak_mib"] for k, v in peaks.items() if k.startswith(name) and _number(v, "peak_mib")]
        least = min(measured) / 1024 if measured else None
        add(f"peak at {SIDE}, {name}", f"under {most} GiB", least, (least or 99) < most, "{:.2f} GiB")
    return rows


def _fastest(cases: Iterable[Mapping[str, Any]], controls: int, encoding: str) -> Mapping[str, Any] | None:
    wanted = (SIDE, 1, controls, encoding)
    known = [
        entry for entry in cases
        if (entry["side"], entry["batch"], entry["controls"], entry["encoding"]) == wanted and "total_ms" in entry
    ]  # fmt: skip
    return min(known, key=lambda entry: entry["total_ms"], default=None)


def _list(part: Any, name: str) -> list[Any]:
    return part.get(name, []) if isinstance(part, Mapping) else []


def _number(entry: Any, name: str) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get(name), int | float)


def _outcomes(report: Mapping[str, Any]) -> list[Sequence[Any]]:
    return [(name, f"{seconds:.0f}", _outcome(report.get(name))) for name, seconds in report["seconds"].items()]


def _outcome(found: Any) -> str:
    if isinstance(found, Mapping) and ("error" in found or "skipped" in found):
        return str(found.get("error", found.get("skipped")))
    errors = sum(_errors(found))
    return f"{errors} errors within" if errors else "done"


def _errors(found: Any) -> Iterable[int]:
    if isinstance(found, Mapping):
        yield int("error" in found and isinstance(found["error"], str))
        for value in found.values():
            yield from _errors(value)
    elif isinstance(found, list):
        for value in found:
            yield from _errors(value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return [line(head), f"|{'---|' * len(head)}", *(line(row) for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return _cell("; ".join(f"{name} {_cell(each)}" for name, each in value.items()))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")[:300]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table(names, [[row.get(name) for name in names] for row in rows])


def _pairs(found: Mapping[str, Any]) -> list[str]:
    return _columns([{"": name, **(value if isinstance(value, Mapping) else {"": f"{name}: {value}"})}
                     for name, value in found.items()])  # fmt: skip


def _ceilings(found: Mapping[str, Any]) -> list[str]:
    return table(("", "measured"), list(found.items()))


def _tests(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'Passed' if found.get('passed') else 'Failed'}: {found.get('summary', found.get('error', ''))}"]
    return [*lines, "", *(f"- `{line}`" for line in found.get("failures", ()))]


def _checks(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["Errors are norms of the difference from float64 in units of the exact norm.", "", *_columns(found)]


def _pointwise(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return _columns(found)


def _cached(found: Mapping[str, Any]) -> list[str]:
    return ["Milliseconds without the host's share. `torch_ms` is the fastest of torch's own.", "",
            *_columns(found["scales"])]  # fmt: skip


def _training(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return _columns(found)


def _pictures(found: Mapping[str, Any]) -> list[str]:
    floor = {
        (entry["side"], entry["batch"], entry["controls"]): entry
        for entry in found.get("floors", ()) if "floor_ms" in entry
    }  # fmt: skip
    rows = []
    for entry in found.get("cases", ()):
        known = floor.get((entry["side"], entry["batch"], entry["controls"]))
        least = known["floor_ms"]["reused" if entry["encoding"] == "reused" else "fresh"] if known else None
        total = entry.get("total_ms")
        rows.append({
            **{name: entry[name] for name in ("side", "batch", "controls", "encoding", "mode")},
            "ms": total, "floor, ms": least, "times the floor": total / least if total and least else None,
            "first call, s": entry.get("first_call_s"), "peak, MiB": entry.get("peak_mib"),
            "KV, MiB": known["kv_bytes"] / 2**20 if known else None, "error": entry.get("error", entry.get("skipped")),
        })  # fmt: skip
    lines = ["From the prompt to the pixels, guidance on, the first call apart.", "", *_columns(rows)]
    lines += ["", "The plain eager implementation of the same network:", "", *_columns(found.get("plain", ()))]
    for entry in found.get("cases", ()):
        if entry["side"] == SIDE and "stages_ms" in entry and entry["controls"] == 0:
            known = floor.get((entry["side"], entry["batch"], 0), {}).get("stages_ms", {})
            stages = [(name, ms, known.get(name)) for name, ms in entry["stages_ms"].items()]
            title = f"Stages at {SIDE}, batch {entry['batch']}, {entry['mode']}:"
            lines += ["", title, "", *table(("stage", "ms", "floor, ms"), stages)]
    return lines
