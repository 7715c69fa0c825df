"""Inspect: the settings inside a picture, and what each scale adds to one."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaleweaver.demo.drawing import Drawn, Moment, Wish
from scaleweaver.demo.errors import told
from scaleweaver.demo.knobs import MAX_SEED, read_seed
from scaleweaver.demo.provenance import kinds_of, settings_and_python
from scaleweaver.demo.strip import facts, progress, strip, strip_of, table_of
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.tabs.generate import DRAWING

TITLE = "Inspect"
ORDER = 30
GAIN = 2.0  # what a scale adds is shown so much stronger, around grey
AFTER, ADDED = "After each scale", f"What it added, {GAIN:g} times as strong, around grey"
COLUMNS = ("scale", "grid", "tokens", "bits", "changed by", "PSNR to the end")


def build(studio: Studio) -> None:
    """Lay out the tab."""
    with gr.Row(elem_classes="sw-columns", equal_height=False):
        with gr.Column(scale=4, min_width=300):
            gr.HTML('<p class="sw-label">Read a picture</p>')
            dropped = gr.Image(
                type="filepath", image_mode=None, sources=["upload"], height=220, label="A PNG that was drawn here",
                elem_id="dropped",
            )  # fmt: skip
            note = gr.HTML("", elem_id="note")
            with gr.Accordion("Settings inside", open=True, visible=False) as inside:
                settings = gr.JSON(show_label=False, elem_id="settings")
                code = gr.Code(language="python", show_label=False, interactive=False)
            gr.HTML('<p class="sw-label">Draw one and look at its scales</p>')
            prompt = gr.Textbox(
                "a large red rocket on grass at noon", label="What to draw", lines=2, max_length=studio.limits.prompt
            )
            with gr.Row(equal_height=True):
                start = gr.Button("Draw", variant="primary", size="lg", elem_id="draw-scales")
                seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
        with gr.Column(scale=7, min_width=300):
            after = gr.HTML(
                '<p class="sw-nothing">The picture after each scale, and what the scale added.</p>',
                elem_id="after",
            )
            added = gr.HTML("")
            line = gr.HTML("")
            table = gr.HTML("", elem_id="table")

    def run(words: str | None, number: float) -> Iterator[tuple[Any, ...]]:
        moments: list[Moment] = []
        for event in studio.draw(Wish(words or "", seed=read_seed(number))):
            if isinstance(event, Moment):
                moments.append(event)
                yield strip(moments, title=AFTER), gr.skip(), progress(event), gr.skip()
            else:
                bits = studio.pipe.transformer.config["bits"]
                additions = strip_of(_additions(moments), moments, title=ADDED)
                yield strip(moments, title=AFTER), additions, facts(event), table_of(COLUMNS, _rows(event, bits))

    def read_file(path: str | None) -> tuple[Any, ...]:
        return _read(path, studio.most_pixels)

    start.click(told(run), [prompt, seed], [after, added, line, table], show_progress="hidden", **DRAWING)
    read = [inside, settings, code, note, prompt, seed]
    dropped.input(told(read_file), dropped, read, show_progress="hidden", api_visibility="private")


def _read(path: str | None, most_pixels: int) -> tuple[Any, ...]:
    """What a picture says of itself; its prompt and seed go into the fields below."""
    if not path:
        return gr.update(visible=False), None, "", "", gr.skip(), gr.skip()
    found, code = settings_and_python(path, most_pixels)
    # anybody may have written the file: what it says goes into the page as text
    kinds = html.escape(", ".join(kinds_of(found)))
    hint = f"Drawn under {kinds}: files keep no maps, so below it is drawn from its words alone." if kinds else ""
    prompt, seed = found.get("prompt"), found.get("seed")
    return (
        gr.update(visible=True),
        found,
        code,
        f'<p class="sw-hint">{hint}</p>' if hint else "",
        prompt if isinstance(prompt, str) else gr.skip(),
        seed if isinstance(seed, int) and 0 <= seed <= MAX_SEED else gr.skip(),
    )


def _additions(moments: list[Moment]) -> list[Image.Image]:
    """Differences of neighbours around grey; before the first there was grey."""
    levels = [_levels(moment) for moment in moments]
    before = [np.full_like(levels[0], 128.0), *levels[:-1]]
    made = [(128 + GAIN * (now - old)).clip(0, 255) for now, old in zip(levels, before, strict=True)]
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in made]


def _rows(drawn: Drawn, bits: int) -> list[list[Any]]:
    """Per scale: its grid, its tokens and bits, how much of the picture it changed, and how far the end still is."""
    levels = [_levels(moment) for moment in drawn.moments]
    end = np.asarray(drawn.pictures[0].convert("RGB"), np.float32)
    rows, before = [], np.full_like(end, 128.0)
    for moment, now in zip(drawn.moments, levels, strict=True):
        tokens = moment.grid[0] * moment.grid[1]
        error = float(((now - end) ** 2).mean())
        distance = "equal" if error == 0 else f"{10 * math.log10(255**2 / error):.1f} dB"
        changed = float(np.abs(now - before).mean()) / 2.55
        grid = f"{moment.grid[0]} &times; {moment.grid[1]}"
        rows.append([moment.index + 1, grid, tokens, tokens * bits, f"{changed:.1f}%", distance])
        before = now
    return rows


def _levels(moment: Moment) -> NDArray[np.float32]:
    return np.asarray(moment.pictures[0].convert("RGB"), np.float32)
