"""Generate: a prompt and up to three controls in, pictures out, shown after every scale while they are drawn."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from scaleweaver.demo.control_slot import MAPS, ControlSlot, examples, read_controls
from scaleweaver.demo.drawing import Drawn, Moment, Wish
from scaleweaver.demo.errors import told
from scaleweaver.demo.kept import in_files
from scaleweaver.demo.knobs import Knobs, read_seed, size_choice
from scaleweaver.demo.strip import facts, progress, strip
from scaleweaver.demo.studio import Studio
from scaleweaver.images import fit
from scaleweaver.metadata import python_of

TITLE = "Generate"
ORDER = 10
DRAWING: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
# on a phone the result lies below everything else
TO_RESULT = (
    """() => { if (innerWidth < 900) document.querySelector("#result").scrollIntoView({ behavior: "smooth" }); }"""
)
EMPTY = '<p class="sw-nothing">Your picture appears here, coarse to fine, while it is drawn.</p>'


def build(studio: Studio) -> None:
    """Lay out the tab."""
    shown = examples(studio)
    first = shown[0] if shown else None
    with gr.Row(elem_classes="sw-columns", equal_height=False):
        with gr.Column(scale=6, min_width=300):
            prompt = gr.Textbox(
                value=first.prompt if first else "", label="What to draw", lines=2, max_length=studio.limits.prompt,
                placeholder="a large red rocket on grass at noon", elem_id="prompt",
            )  # fmt: skip
            with gr.Row(elem_classes="sw-actions"):
                start = gr.Button("Draw", variant="primary", size="lg", scale=3, min_width=150, elem_id="draw")
                stop = gr.Button("Stop", size="lg", scale=3, min_width=150, visible=False, elem_id="stop")
                surprise = gr.Button("Surprise me", size="lg", scale=1, min_width=130, elem_id="surprise")
            if shown:
                gr.HTML('<p class="sw-label">Or begin with an example</p>')
                cards = gr.Gallery(
                    [(example.path, studio.label(example.kind)) for example in shown],
                    columns=len(shown), height="auto", allow_preview=False, show_label=False, object_fit="cover",
                    elem_classes="sw-cards", buttons=[], interactive=False, container=False,
                )  # fmt: skip
            size = size_choice(studio)
            slots = [
                ControlSlot(studio, number, prompt=prompt, size=size, example=first if number == 1 else None)
                for number in range(1, (studio.limits.controls if studio.kinds else 0) + 1)
            ]
            with gr.Accordion("More settings", open=False):
                knobs = Knobs(studio, size)
        with gr.Column(scale=5, min_width=300, elem_id="result"):
            pictures = gr.Gallery(
                columns=1, height="auto", object_fit="contain", show_label=False, format="png", elem_id="pictures",
                buttons=["fullscreen", "download"], interactive=False, visible=False,
            )  # fmt: skip
            scales = gr.HTML(EMPTY, elem_id="scales")
            line = gr.HTML("", elem_id="facts")
            with gr.Column(visible=False) as details:
                download = gr.DownloadButton("Download PNG, settings inside", variant="secondary")
                with gr.Accordion("Control and picture", open=True, visible=False) as compared:
                    slider = gr.ImageSlider(
                        type="filepath", format="png", show_label=False, interactive=False, elem_id="slider",
                        max_height=420, buttons=["fullscreen"],
                    )  # fmt: skip
                with gr.Accordion("The Python for this picture", open=False):
                    code = gr.Code(language="python", show_label=False, interactive=False, elem_id="python")
    drawn = gr.State(None, time_to_live=3600)

    if slots:
        first_slot = slots[0]
        outputs = first_slot.scene_outputs(prompt)
        given = [first_slot.kind, size]
        surprise.click(in_files(told(first_slot.surprise)), given, outputs, show_progress_on=first_slot.map, **MAPS)
    if shown:

        def load(chosen: str, event: gr.SelectData) -> tuple[Any, ...]:
            example = shown[event.index]
            return (*slots[0].load_example(example, chosen), example.prompt)

        cards.select(
            in_files(told(load)),
            size,
            [*slots[0].outputs, slots[0].tabs, slots[0].photo, prompt],
            show_progress_on=slots[0].map,
            **MAPS,
        )

    def run(words: str | None, seed: float, count: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        controls = read_controls(studio, values[len(knobs.inputs) :])
        options = knobs.options(bool(controls), *values[: len(knobs.inputs)])
        wish = Wish(words or "", controls, read_seed(seed), int(count), options)
        yield from show(studio, wish)

    settled = [pictures, scales, line, details, download, compared, slider, code, drawn, start, stop]
    inputs = [prompt, knobs.seed, knobs.count, *knobs.inputs, *(part for slot in slots for part in slot.inputs)]
    gr.on([start.click, prompt.submit], None, js=TO_RESULT, api_visibility="private")
    # a press right after Stop counts, while the stopped drawing still finishes its scale
    drawing = gr.on(
        [start.click, prompt.submit],
        told(run),
        inputs,
        settled,
        show_progress="hidden",
        trigger_mode="multiple",
        **DRAWING,
    )
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    drawing.success(_ready, None, [start, stop], **quiet)
    drawing.failure(_stopped, None, [start, stop, line], **quiet)
    stop.click(_stopped, None, [start, stop, line], cancels=[drawing], **quiet)
    pictures.select(_select, [pictures, drawn, slider], [scales, download, slider, code], **quiet)


def show(studio: Studio, wish: Wish) -> Iterator[tuple[Any, ...]]:
    """Values of the result's components, after every scale and at the end."""
    busy = (gr.update(visible=False), gr.update(visible=True))
    skip = gr.skip()
    columns = 1 if wish.count == 1 else 2
    moments: list[Moment] = []
    yield (skip, skip, '<p class="sw-hint">Waiting for the model</p>', *([skip] * 6), *busy)
    for event in studio.draw(wish):
        if isinstance(event, Moment):
            moments.append(event)
            gallery = gr.update(value=event.pictures, columns=columns, visible=True, selected_index=None)
            yield (gallery, strip(moments), progress(event), *([skip] * 6), *busy)
        else:
            with tempfile.TemporaryDirectory(prefix="scaleweaver-") as folder:
                # gradio copies the files before it asks for the next value
                yield (*_finished(wish, event, moments, Path(folder)), skip, skip)


def _finished(wish: Wish, drawn: Drawn, moments: list[Moment], folder: Path) -> tuple[Any, ...]:
    paths = [folder / f"{_name(wish.prompt)}-{picture.settings['seed']}.png" for picture in drawn.pictures]
    for picture, path in zip(drawn.pictures, paths, strict=True):
        picture.save(path)
    kept = [
        {"strip": strip(moments, i), "python": python_of(drawn.settings(i)), "seed": drawn.settings(i)["seed"]}
        for i in range(len(paths))
    ]
    captions = [f"seed {entry['seed']}" for entry in kept]
    pair = None
    if wish.controls:
        first = drawn.pictures[0]
        pair = (fit(wish.controls[0].image, first.height, first.width), first)
    gallery = gr.update(value=list(zip(map(str, paths), captions, strict=True)), visible=True)
    return (
        gallery,
        kept[0]["strip"],
        facts(drawn),
        gr.update(visible=True),
        str(paths[0]),
        gr.update(visible=pair is not None),
        pair,
        kept[0]["python"],
        kept,
    )


def _select(gallery: Any, kept: Any, pair: Any, event: gr.SelectData) -> tuple[Any, ...]:
    """Another picture of the gallery: its scales, its file, its Python."""
    if not kept or event.index >= len(kept):
        return (gr.skip(),) * 4  # a preview, drawn just now
    path, entry = gallery[event.index][0], kept[event.index]
    return entry["strip"], path, (pair[0], path) if pair and pair[0] else gr.skip(), entry["python"]


def _ready() -> tuple[Any, Any]:
    return gr.update(visible=True), gr.update(visible=False)


def _stopped() -> tuple[Any, ...]:
    return *_ready(), ""


def _name(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:50].strip("-") or "picture"
