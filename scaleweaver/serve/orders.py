"""What the server draws: orders of pictures, each with settings that say which others it may share a batch with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from scaleweaver.schedule import ScaleSchedule

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class ControlSettings:
    """One control without its image; a mask without any white switches it off, so those keep to themselves."""

    kind: str
    scale: Numbers
    start: float
    end: float
    scales: tuple[int, ...] | None
    control_guidance_scale: Numbers | None
    resize: str
    masked: bool
    all_black: bool


@dataclass(frozen=True)
class Settings:
    """All that the pictures of one pipeline call share."""

    plan: ScaleSchedule
    guidance_scale: Numbers | None = None
    control_guidance_scale: Numbers | None = None
    guidance_layer: int | None = None
    temperature: Numbers | None = None
    top_k: int | None = None
    top_p: float | None = None
    has_negative: bool = False
    controls: tuple[ControlSettings, ...] = ()

    @property
    def numbers(self) -> dict[str, Any]:
        """Those that were given, as arguments of the pipeline."""
        names = ("guidance_scale", "control_guidance_scale", "guidance_layer", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Preview:
    """A picture of the order, `index`, as it is after a scale."""

    index: int
    scale: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A finished picture. tokens: of its prompt, negative prompt included."""

    index: int
    image: Image.Image
    tokens: int


@dataclass(frozen=True)
class Failed:
    index: int
    error: Exception


Event = Preview | Drawn | Failed


@dataclass(eq=False)
class Picture:
    """One picture of an order on its way: `send` takes what becomes of it, from any thread.

    maps and masks: one per control, already of the picture's size. previews: scales after which it is wanted; the
    drawing thread takes out what it has sent.
    """

    index: int
    prompt: str
    seed: int
    negative_prompt: str | None
    settings: Settings
    maps: Sequence[Image.Image]
    masks: Sequence[Image.Image | None]
    previews: set[int] = field(default_factory=set)
    send: Callable[[Event], None] = lambda event: None
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    over: bool = False

    def finish(self, event: Drawn | Failed) -> None:
        self.over = True
        self.send(event)


@dataclass(frozen=True)
class Order:
    """A request as it was understood. previews: the scales after which every picture is sent as it is."""

    pictures: list[Picture]
    previews: tuple[int, ...]
    stream: bool
    output_format: str
    quality: int | None
    as_url: bool
