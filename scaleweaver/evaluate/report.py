"""Results as files: results.json for programs, results.md for documents, and report.html, one page that needs no other.

The page carries its pictures and its style inside and asks the network for nothing.
"""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from scaleweaver import __version__
from scaleweaver.doctor import processor
from scaleweaver.toybox.store import write_atomic

Pixels = NDArray[np.uint8]
STYLE = Path(__file__).parent.parent / "assets" / "report.css"
BOUNDS = ("chance", "other prompts", "reconstruction", "true pictures", "other true pictures")  # paler in the chart
SHOWN_SIDE = 384  # pixels; larger pictures are shown smaller, the files beside the page are complete


@dataclass(frozen=True)
class Card:
    """Pictures side by side with their labels, the prompt, and a line on how well it went."""

    pictures: Sequence[tuple[str, Pixels]]
    prompt: str
    score: str


@dataclass(frozen=True)
class Panel:
    """A titled grid of cards."""

    title: str
    note: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found, as JSON-able numbers and as pictures. `lead` is the row that the pictures are from."""

    results: Mapping[str, Any]
    panels: Sequence[Panel]
    lead: str


def write(out: Path, outcome: Outcome, *, title: str, notes: Sequence[str] = (), command: str = "") -> list[Path]:
    """results.json, results.md and report.html in the folder `out`; returns their paths."""
    results = {**outcome.results, "machine": machine(), "command": command, "notes": list(notes)}
    texts = {
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "results.md": f"{title}\n\n{markdown(results)}\n",
        "report.html": page(results, outcome, title),
    }
    for name, text in texts.items():
        write_atomic(out / name, text.encode())
    return [out / name for name in texts]


def machine() -> dict[str, Any]:
    """Where the numbers were measured."""
    versions = {"scaleweaver": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    where = {"processor": processor(), "cores": os.cpu_count(), "gpu": name}
    return where | {"system": platform.platform(terse=True), "versions": versions}


def markdown(results: Mapping[str, Any], *, errors: bool = True) -> str:
    """The table, with standard errors."""
    columns = shown_columns(results)
    lines = ["| | pictures | " + " | ".join(column["title"] for column in columns) + " |"]
    lines += ["|---" * (len(columns) + 2) + "|"]
    for name, values in results["rows"].items():
        cells = [number(values, column, errors=errors) for column in columns]
        lines.append(f"| {name} | {values['pictures']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown_columns(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Columns in which some row has a number."""
    rows = results["rows"].values()
    return [column for column in results["columns"] if any(row.get(column["name"]) is not None for row in rows)]


def number(values: Mapping[str, Any], column: Mapping[str, Any], *, errors: bool = True) -> str:
    """Mean and standard error of one cell."""
    value, error = values.get(column["name"]), values.get(f"{column['name']}_error")
    if value is None:
        return "-"
    digits = column["digits"]
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if errors and error is not None else "")


def page(results: Mapping[str, Any], outcome: Outcome, title: str) -> str:
    """The whole page."""
    settings = results["settings"]
    where = " ".join(str(settings[name]) for name in ("data", "split") if name in settings)
    about = [f"model {results['model']}", f"{settings['count']} prompts of {where}"]
    about += [f"read by {settings['meter']}"] if "meter" in settings else []
    body = [
        f"<header><p class=kicker>scaleweaver evaluation</p><h1>{escape(title)}</h1>",
        f"<p class=about>{escape(' · '.join(about))}</p></header>",
        _bars(results, outcome.lead),
        f"<section><h2>All numbers</h2>{_table(results, outcome.lead)}{_legend(results)}</section>",
        *(_panel(panel) for panel in outcome.panels),
        _details(results),
    ]
    head = f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    return f"<!doctype html><html lang=en><head>{meta}{head}</head><body><main>{''.join(body)}</main></body></html>\n"


def _bars(results: Mapping[str, Any], lead: str) -> str:
    """The main column of every row as bars, with one standard error to either side."""
    column = next((column for column in shown_columns(results) if column["name"] == results["main"]), None)
    if column is None:
        return ""
    name = column["name"]
    values = {row: cells for row, cells in results["rows"].items() if cells.get(name) is not None}
    most = max(float(cells[name]) + float(cells.get(f"{name}_error") or 0) for cells in values.values())
    full = 1.0 if column["higher"] else most or 1.0
    bars = []
    for row, cells in values.items():
        share, error = cells[name] / full, (cells.get(f"{name}_error") or 0) / full
        low, high = max(share - error, 0), min(share + error, 1)
        whisker = f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>' if error else ""
        kind = " lead" if row == lead else " bound" if row in BOUNDS else ""
        bars.append(
            f'<div class="bar{kind}"><span>{escape(row)}</span>'
            f'<div class=track><b style="width:{100 * min(share, 1):.2f}%"></b>{whisker}</div>'
            f"<output>{cells[name]:.{column['digits']}f}</output></div>"
        )
    which = "higher is better" if column["higher"] else "lower is better"
    return f"<section><h2>{escape(column['title'])} <small>{which}</small></h2>{''.join(bars)}</section>"


def _table(results: Mapping[str, Any], lead: str) -> str:
    columns = shown_columns(results)
    heads = "".join(
        f"<th>{escape(column['title'])} <span>{'↑' if column['higher'] else '↓'}</span></th>" for column in columns
    )
    rows = []
    for name, values in results["rows"].items():
        cells = "".join(f"<td>{_cell(values, column)}</td>" for column in columns)
        mark = " class=lead" if name == lead else ""
        rows.append(f"<tr{mark}><th>{escape(name)}</th><td>{values['pictures']}</td>{cells}</tr>")
    head = f"<thead><tr><th></th><th>pictures</th>{heads}</tr></thead>"
    return f"<div class=scroll><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _cell(values: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    mean, plus_minus, error = number(values, column).partition(" ± ")
    return f"{mean} <small>±{error}</small>" if plus_minus else mean


def _legend(results: Mapping[str, Any]) -> str:
    """What rows and columns mean, and what has to be known of this evaluation."""
    columns = [(column["title"], column["note"]) for column in shown_columns(results) if column["note"]]
    lists = ""
    for notes in (results["row_notes"].items(), columns):
        terms = "".join(f"<dt>{escape(title)}</dt><dd>{escape(note)}</dd>" for title, note in notes)
        lists += f"<dl>{terms}</dl>"
    extra = "".join(f"<p class=note>{escape(note)}</p>" for note in results["notes"])
    return f"<div class=legend>{lists}</div>{extra}"


def _panel(panel: Panel) -> str:
    cards = []
    for card in panel.cards:
        pictures = "".join(
            f'<figure><img src="{_inlined(picture)}" alt="{escape(label)}" loading=lazy>'
            f"<figcaption>{escape(label)}</figcaption></figure>"
            for label, picture in card.pictures
        )
        words = f"<p>{escape(card.prompt)}</p><p class=score>{escape(card.score)}</p>"
        cards.append(f"<article><div class=strip>{pictures}</div>{words}</article>")
    note = f" <small>{escape(panel.note)}</small>" if panel.note else ""
    return f"<section><h2>{escape(panel.title)}{note}</h2><div class=grid>{''.join(cards)}</div></section>"


def _details(results: Mapping[str, Any]) -> str:
    command = f"<h2>Command</h2><pre>{escape(results['command'])}</pre>" if results["command"] else ""
    shown = {name: results[name] for name in ("settings", "machine")}
    text = escape(json.dumps(shown, indent=2, ensure_ascii=False))
    return f"<section>{command}<details><summary>Settings and machine</summary><pre>{text}</pre></details></section>"


def _inlined(picture: Pixels) -> str:
    """A picture as a data address: WebP, without loss where it is small."""
    image = Image.fromarray(picture)
    small = max(image.size) <= SHOWN_SIDE
    if not small:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    data = BytesIO()
    image.save(data, "WEBP", lossless=small, quality=70 if small else 88, method=4)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
