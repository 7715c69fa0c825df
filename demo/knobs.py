"""The folded numbers of a drawing: what a model has of its own shows as its default."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from scaleweaver.demo.studio import Studio

MAX_SEED = 2**31 - 1
UNSET = {"guidance_scale": 3.0, "control_guidance_scale": 1.0, "temperature": 1.0}  # where a model has no number


def shown_number(studio: Studio, name: str) -> float:
    """Where a slider stands at first: at the model's own number, or at the first where it has one per scale."""
    own = studio.pipe.config[name]
    if isinstance(own, Sequence):
        return float(own[0])
    return float(UNSET[name] if own is None else own)


def changed_numbers(studio: Studio, numbers: dict[str, float]) -> dict[str, Any]:
    """Arguments of a call for the sliders that were moved; the model keeps its own others, one per scale too."""
    return {name: value for name, value in numbers.items() if value != shown_number(studio, name)}


def size_choice(studio: Studio) -> gr.Dropdown:
    """The size of the picture, to be rendered where it belongs; the controls read it too."""
    names = list(studio.sizes)
    return gr.Dropdown(names, value=studio.own_size_name, label="Size", visible=len(names) > 1, render=False)


class Knobs:
    """Seed, count, guidance, temperature, size and what not to draw; `inputs` is what `options` reads."""

    def __init__(self, studio: Studio, size: gr.Dropdown) -> None:
        self.studio, self.size = studio, size
        counts = sorted({1, 2, studio.limits.pictures})
        with gr.Row(equal_height=True):
            self.seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
            dice = gr.Button("New seed", size="sm", scale=0, min_width=90)
            self.count = gr.Radio(counts, value=1, label="Pictures", scale=2, min_width=200)
        own = {name: shown_number(studio, name) for name in UNSET}
        self.guidance = gr.Slider(1, 10, value=own["guidance_scale"], step=0.5, label="How closely to follow the words")
        self.control_guidance = gr.Slider(
            1, 10, value=own["control_guidance_scale"], step=0.5, label="How closely to follow the controls"
        )
        self.temperature = gr.Slider(
            0.1, 2, value=own["temperature"], step=0.1, label="Temperature: low is safe, high is bold"
        )
        self.negative = gr.Textbox(label="What not to draw", max_length=studio.limits.prompt)
        size.render()
        dice.click(lambda: secrets.randbelow(MAX_SEED), None, self.seed, api_visibility="private", queue=False)

    @property
    def inputs(self) -> list[Any]:
        return [self.guidance, self.control_guidance, self.temperature, self.negative, self.size]

    def options(
        self,
        controlled: bool,
        guidance: float,
        control_guidance: float,
        temperature: float,
        negative: str | None,
        size: str,
    ) -> dict[str, Any]:
        """Arguments of a call for what differs from the model's own numbers, so that its Python stays short."""
        numbers = {"guidance_scale": guidance, "temperature": temperature}
        if controlled:
            numbers["control_guidance_scale"] = control_guidance
        chosen = changed_numbers(self.studio, numbers)
        if negative and negative.strip():
            chosen["negative_prompt"] = negative.strip()
        if len(self.studio.sizes) > 1:
            chosen["height"], chosen["width"] = self.studio.size(size)
        return chosen


def read_seed(value: Any) -> int:
    """What stands in the field of the seed."""
    if value is None or not 0 <= value <= MAX_SEED:
        raise ValueError(f"the seed is {value}; write a whole number from 0 to {MAX_SEED}")
    return int(value)
