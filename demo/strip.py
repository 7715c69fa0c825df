"""HTML of what a drawing did: the strip of its scales, and the line of facts below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from scaleweaver.demo.drawing import Drawn, Moment
from scaleweaver.demo.encoded import data_url

SIDE = 128  # pixels of a picture in the strip


def strip(moments: Sequence[Moment], image: int = 0, *, title: str = "") -> str:
    """One picture after each scale, coarse to fine; scales to come are empty frames."""
    return strip_of([moment.pictures[image] for moment in moments], moments, title=title)


def strip_of(pictures: Sequence[Image.Image], moments: Sequence[Moment], *, title: str = "") -> str:
    """Any pictures that belong to the scales, one each."""
    frames = [_frame(picture, moment) for picture, moment in zip(pictures, moments, strict=True)]
    empty = "<figure><div></div><figcaption>&middot;</figcaption></figure>"
    head = f'<p class="sw-label">{title}</p>' if title else ""
    return f'{head}<div class="sw-strip">{"".join(frames)}{empty * (moments[-1].scales - len(moments))}</div>'


def _frame(picture: Image.Image, moment: Moment) -> str:
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    grid = f"{moment.grid[0]}&times;{moment.grid[1]}"
    words = f"after scale {moment.index + 1} of {moment.scales}"
    return f'<figure><img src="{data_url(picture)}" alt="{words}"><figcaption>{grid}</figcaption></figure>'


def progress(moment: Moment) -> str:
    """While it is drawn."""
    height, width = moment.grid
    return line_of([("scale", f"{moment.index + 1} of {moment.scales}"), ("grid", f"{height} x {width}")])


def facts(drawn: Drawn) -> str:
    """Once it is drawn: time, work and memory, as measured."""
    count = len(drawn.pictures)
    return line_of(
        [
            ("time", f"{drawn.seconds:.2f} s"),
            ("pictures", str(count)),
            ("scales", str(len(drawn.moments))),
            ("tokens each", str(drawn.tokens)),
            ("memory", f"{drawn.memory / 2**20:,.0f} MiB"),
        ]
    )


def line_of(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values on one line."""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="sw-facts" aria-live="polite">{items}</dl>'


def table_of(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers in rows."""
    top = "".join(f"<th scope='col'>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="sw-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
