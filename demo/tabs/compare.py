"""Compare: the same prompt, seed and control under two settings, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from scaleweaver.demo.control_slot import ControlSlot, examples, read_controls
from scaleweaver.demo.drawing import Drawn, Moment, Wish
from scaleweaver.demo.errors import told
from scaleweaver.demo.knobs import changed_numbers, read_seed, shown_number
from scaleweaver.demo.strip import line_of, strip
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.tabs.generate import DRAWING

TITLE = "Compare"
ORDER = 20


class Side:
    """The settings of one side; what both share lies beside them."""

    def __init__(self, studio: Studio, name: str, strength: float) -> None:
        gr.HTML(f'<p class="sw-side">{name}</p>')
        self.strength = gr.Slider(0, 2, value=strength, step=0.05, label="Strength of the control")
        self.end = gr.Slider(0, 1, value=1, step=0.05, label="Control acts until")
        own = shown_number(studio, "guidance_scale")
        self.guidance = gr.Slider(1, 10, value=own, step=0.5, label="How closely to follow the words")
        own = shown_number(studio, "temperature")
        self.temperature = gr.Slider(0.1, 2, value=own, step=0.1, label="Temperature")

    @property
    def inputs(self) -> list[Any]:
        return [self.strength, self.end, self.guidance, self.temperature]


def build(studio: Studio) -> None:
    """Lay out the tab."""
    shown = examples(studio)
    first = shown[0] if shown else None
    with gr.Row(elem_classes="sw-columns", equal_height=False):
        with gr.Column(scale=6, min_width=300):
            prompt = gr.Textbox(
                value=first.prompt if first else "", label="What to draw", lines=2, max_length=studio.limits.prompt
            )
            with gr.Row(equal_height=True):
                start = gr.Button("Draw both", variant="primary", size="lg", elem_id="draw-both")
                seed = gr.Number(7, label="Seed of both", precision=0, minimum=0, min_width=120)
            with gr.Row(equal_height=False):
                with gr.Column(min_width=150, elem_classes="sw-card"):
                    left = Side(studio, "A", 0.0)
                with gr.Column(min_width=150, elem_classes="sw-card"):
                    right = Side(studio, "B", 1.0)
            slots = [ControlSlot(studio, 1, prompt=prompt, example=first)] if studio.kinds else []
            for slot in slots:
                slot.scale.visible = slot.end.visible = False  # each side has its own
        with gr.Column(scale=5, min_width=300):
            slider = gr.ImageSlider(
                type="pil", format="png", label="A left, B right", interactive=False, elem_id="both", max_height=460
            )
            line = gr.HTML('<p class="sw-nothing">Two pictures from one seed: what differs is the setting.</p>')
            strips = [gr.HTML(), gr.HTML()]

    def run(words: str | None, number: float, *values: Any) -> Iterator[tuple[Any, ...]]:
        sides, controls = (values[:4], values[4:8]), values[8:]
        done: list[Drawn] = []
        rows = ["", ""]
        for which, (strength, end, guidance, temperature) in enumerate(sides):
            given = [list(controls[i : i + 6]) for i in range(0, len(controls), 6)]
            for slot in given:
                slot[2], slot[4] = strength, end
            made = read_controls(studio, [value for slot in given for value in slot])
            options = changed_numbers(studio, {"guidance_scale": guidance, "temperature": temperature})
            moments: list[Moment] = []
            for event in studio.draw(Wish(words or "", made, read_seed(number), 1, options)):
                if isinstance(event, Drawn):
                    done.append(event)
                    continue
                moments.append(event)
                rows[which] = strip(moments, title="AB"[which])
                yield gr.skip(), gr.skip(), *rows
        a, b = (drawn.pictures[0] for drawn in done)
        yield (a, b), _difference(np.asarray(a, np.float32), np.asarray(b, np.float32), done), *rows

    inputs = [prompt, seed, *left.inputs, *right.inputs, *(part for slot in slots for part in slot.inputs)]
    start.click(told(run), inputs, [slider, line, *strips], show_progress_on=slider, **DRAWING)


def _difference(a: Any, b: Any, done: list[Drawn]) -> str:
    change = float(np.abs(a - b).mean()) / 255
    pairs = [
        ("mean difference", f"{change:.1%}"),
        ("time of A", f"{done[0].seconds:.2f} s"),
        ("time of B", f"{done[1].seconds:.2f} s"),
    ]
    return line_of(pairs)
