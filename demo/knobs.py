"""The folded numbers of a drawing: what a model has of its own shows as its default."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from scaleweaver.demo.studio import Studio

MAX_SEED = 2**31 - 1


def first_number(value: Any, otherwise: float) -> float:
    """The number of a setting that may have one per scale."""
    if isinstance(value, Sequence):
        return float(value[0])
    return float(otherwise if value is None else value)


class Knobs:
    """Seed, count, guidance, temperature and what not to draw; `inputs` is what `options` reads."""

    def __init__(self, studio: Studio) -> None:
        self.studio, config = studio, studio.pipe.config
        counts = sorted({1, 2, studio.limits.pictures})
        with gr.Row(equal_height=True):
            self.seed = gr.Number(7, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
            dice = gr.Button("New seed", size="sm", scale=0, min_width=90)
            self.count = gr.Radio(counts, value=1, label="Pictures", scale=2, min_width=200)
        self.own = (
            first_number(config["guidance_scale"], 3.0),
            first_number(config["control_guidance_scale"], 1.0),
            first_number(config["temperature"], 1.0),
        )
        self.guidance = gr.Slider(1, 10, value=self.own[0], step=0.5, label="How closely to follow the words")
        self.control_guidance = gr.Slider(
            1, 10, value=self.own[1], step=0.5, label="How closely to follow the controls"
        )
        self.temperature = gr.Slider(
            0.1, 2, value=self.own[2], step=0.1, label="Temperature: low is safe, high is bold"
        )
        self.negative = gr.Textbox(label="What not to draw", max_length=studio.limits.prompt)
        sizes = list(studio.sizes)
        own = f"{studio.schedule.width} x {studio.schedule.height}"
        self.size = gr.Dropdown(sizes, value=own, label="Size", visible=len(sizes) > 1)
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
        chosen: dict[str, Any] = {}
        if guidance != self.own[0]:
            chosen["guidance_scale"] = guidance
        if controlled and control_guidance != self.own[1]:
            chosen["control_guidance_scale"] = control_guidance
        if temperature != self.own[2]:
            chosen["temperature"] = temperature
        if negative and negative.strip():
            chosen["negative_prompt"] = negative.strip()
        if len(self.studio.sizes) > 1:
            if size not in self.studio.sizes:
                raise ValueError(f"{size!r} is no size of this model; choose one of the list")
            chosen["height"], chosen["width"] = self.studio.sizes[size]
        return chosen


def read_seed(value: Any) -> int:
    """What stands in the field of the seed."""
    if value is None or not 0 <= value <= MAX_SEED:
        raise ValueError(f"the seed is {value}; write a whole number from 0 to {MAX_SEED}")
    return int(value)
