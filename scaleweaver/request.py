"""The arguments of a pipeline call: what was meant, checked before any network runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaleweaver.conditions import check_prompts, pack
from scaleweaver.contracts import Control, SamplerState, Search, TextFeatures
from scaleweaver.guidance import ClassifierFreeGuidance, ControlGuidance, per_scale
from scaleweaver.schedule import ScaleSchedule, ScaleStep, infinity_schedule, nearest_schedule

logger = logging.getLogger(__name__)

Numbers = float | Sequence[float]
Callback = Callable[[Any, int, ScaleStep, dict[str, Any]], Any]


@dataclass(frozen=True)
class Request:
    """What a call asks for: B images, `images_per_prompt` for each of `texts`."""

    plan: ScaleSchedule
    guidance: ClassifierFreeGuidance | ControlGuidance
    texts: list[str | None]
    generators: list[torch.Generator]
    images_per_prompt: int
    controls: list[Control]

    def settings(self, image: int, values: Mapping[str, Any], negative: str | Sequence[str] | None) -> dict[str, Any]:
        """The arguments, with `values`, that draw an image again; what is None was not given."""
        row = image // self.images_per_prompt
        negatives = [negative] if isinstance(negative, str) or negative is None else list(negative)
        entry = {
            "model": values.get("model"),
            "prompt": self.texts[row],
            "seed": values.get("seed"),
            "negative_prompt": negatives[row % len(negatives)],
            "height": self.plan.height,
            "width": self.plan.width,
            **values,
            "control": [_remember(control) for control in self.controls] or None,
        }
        return {name: value for name, value in entry.items() if value is not None}


def _remember(control: Control) -> dict[str, Any]:
    """What settings keep of a settled control: all but the images."""
    assert not isinstance(control.scales, slice)
    kept = {
        "kind": control.kind,
        "scale": _plain(control.scale, "control scale"),
        "start": float(control.start),
        "end": float(control.end),
        "scales": None if control.scales is None else [*control.scales],
        "control_guidance_scale": _plain(control.control_guidance_scale, "control_guidance_scale"),
        "resize": control.resize,
        "masked": control.mask is not None,
    }
    return {name: value for name, value in kept.items() if value is not None}


class Lineage:
    """A search that also knows which image each survivor once was; without a search, all stay what they are."""

    def __init__(self, search: Search | None, images: int) -> None:
        self.search = search
        self.origins = list(range(images))

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        survivors = None if self.search is None else self.search.select(state, step)
        if survivors is not None:
            self.origins = [self.origins[row] for row in survivors.tolist()]
        return survivors


class Follower:
    """Called after every scale: moves the progress bar, calls back, and remembers whose random streams are left."""

    def __init__(self, pipe: Any, bar: Any, callback: Callback | None) -> None:
        self.pipe, self.bar, self.callback = pipe, bar, callback
        self._state: SamplerState | None = None

    def __call__(self, step: ScaleStep, state: SamplerState) -> None:
        self._state = state
        self.bar.update()
        if self.callback is not None:
            # bound now: later scales change the state
            seen = {"latent": state.latent, "preview": partial(self.pipe.preview, state.latent)}
            self.callback(self.pipe, step.index, step, seen)

    @property
    def generators(self) -> list[torch.Generator]:
        """One per image of the finished run."""
        return self._state.generators if self._state else []


def read_numbers(
    defaults: Mapping[str, Any],
    guidance_scale: Numbers | None,
    control_guidance_scale: Numbers | None,
    guidance_layer: int | None,
    temperature: Numbers | None,
    top_k: int | None,
    top_p: float | None,
    *,
    controlled: bool,
) -> dict[str, Any]:
    """The numbers of a call, the model's own where none was given, as plain JSON.

    The model's own control_guidance_scale is for calls under a control that do not choose another kind of guidance.
    """
    given = {
        "guidance_scale": guidance_scale,
        "control_guidance_scale": control_guidance_scale,
        "guidance_layer": guidance_layer,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    own = dict(defaults)
    if not controlled or guidance_layer is not None:
        own.pop("control_guidance_scale", None)
    return {name: _plain(own.get(name) if value is None else value, name) for name, value in given.items()}


def with_parts(values: Mapping[str, Any], parts: Mapping[str, Any], forced: Sequence[Tensor] | None) -> dict[str, Any]:
    """Values with what else decided the picture: `parts` of the loop by their names, how many scales were forced.

    The numbers that a given sampler never saw are left out.
    """
    unused = ("temperature", "top_k", "top_p") if parts["sampler"] is not None else ()
    kept = {name: value for name, value in values.items() if name not in unused}
    named = {name: None if part is None else _name(part) for name, part in parts.items()}
    return {**kept, **named, "forced": len(forced) if forced else None}


def _name(part: Any) -> str:
    """How an object shows itself, or its class where that is an address or as long as a printed network."""
    text = repr(part)
    return text if text.isprintable() and len(text) <= 200 and not text.startswith("<") else type(part).__name__


def _plain(value: Any, name: str) -> Any:
    """A number or a list of them from any number-like thing (numpy, torch)."""
    if value is None:
        return None
    whole, single = name in ("top_k", "guidance_layer"), name in ("top_k", "top_p", "guidance_layer")
    try:
        array = np.asarray(value.tolist() if hasattr(value, "tolist") else value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; pass a number, or a list with one per scale") from None
    if array.ndim > 1 or (array.ndim == 1 and single):
        raise ValueError(
            f"{name} has shape {array.shape}; pass a number, or a flat list where one per scale is allowed"
        )
    if whole:
        if isinstance(value, bool) or not np.isfinite(array) or array != int(array):
            raise ValueError(f"{name} is {value!r}; pass a whole number")
        return int(array)
    return array.tolist()


def read_guidance(
    values: Mapping[str, Any], scales: int, controls: Sequence[Control], active: Sequence[Control], depth: int
) -> ClassifierFreeGuidance | ControlGuidance:
    """Guidance on the text alone, or on text and controls apart where the call or a control has a weight for that.

    `active` are the settled ones of the `controls` that change anything; one without a weight of its own takes that of
    the call, or 1. With guidance_layer it acts on the hidden state after that of `depth` layers, a negative one counts
    from the end.
    """
    layer = values["guidance_layer"]
    if layer is not None and not -depth <= layer < depth:
        raise ValueError(f"guidance_layer is {layer}; this model has the layers 0 to {depth - 1}, or {-depth} to -1")
    shared, own = values["control_guidance_scale"], [control.control_guidance_scale for control in active]
    if shared is None and all(scale is None for scale in own):
        return ClassifierFreeGuidance(values["guidance_scale"], scales, None if layer is None else layer % depth)
    if layer is not None:
        raise ValueError("guidance_layer mixes two branches, control_guidance_scale needs three; pass one of them")
    if not controls:
        raise ValueError("control_guidance_scale was given without a control; pass control= or leave it out")
    shared = 1.0 if shared is None else per_scale(shared, scales, "control_guidance_scale")
    weights = [shared if scale is None else scale for scale in own]
    return ControlGuidance(values["guidance_scale"], weights, scales)


def read_prompts(prompt: str | Sequence[str] | None, prompt_embeds: Any) -> list[str | None]:
    """One entry per prompt, None where only its embedding is known."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("pass either prompt or prompt_embeds")
    if prompt is None:
        return [None for _ in read_features(prompt_embeds).lengths]
    return [*check_prompts(prompt, "prompt")]


def read_features(embeds: Tensor | Sequence[Tensor] | TextFeatures | None) -> TextFeatures:
    """prompt_embeds as features."""
    return embeds if isinstance(embeds, TextFeatures) else pack(embeds if embeds is not None else [])


def check_call(images_per_prompt: Any, output_type: Any, callback: Any) -> None:
    """The arguments that only have to be of the right kind."""
    if isinstance(images_per_prompt, bool) or not isinstance(images_per_prompt, int) or images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {images_per_prompt!r}; pass a whole number, at least 1")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'output_type={output_type!r}; pass "pil", "np", "pt" or "latent"')
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is a {type(callback).__name__}; pass a function")


def read_schedule(
    schedule: ScaleSchedule | Mapping[str, Any] | None,
    config: Mapping[str, Any],
    height: int | None,
    width: int | None,
    control_size: tuple[int, int] | None = None,
) -> ScaleSchedule:
    """The schedule of a call: the given one, or that of the model's config nearest to the size.

    Without a size it is the model's default, in the aspect of the control image (height, width) where the model knows
    several aspects.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height is {height}, width is {width}; pass both or none")
    for name, value in (("height", height), ("width", width)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; pass a whole number of pixels, at least 1")
    plan = _nearest(config, height, width, control_size) if schedule is None else _given(schedule)
    if height is not None and (plan.height, plan.width) != (height, width):
        if schedule is not None:
            raise ValueError(f"the schedule draws {plan.width}x{plan.height}, not {width}x{height}; pass one of both")
        logger.warning("%dx%d is no size of this model: drawing %dx%d", width, height, plan.width, plan.height)
    return plan


def _nearest(
    config: Mapping[str, Any], height: int | None, width: int | None, control_size: tuple[int, int] | None
) -> ScaleSchedule:
    if "grids" in config:
        return ScaleSchedule.from_dict(config)
    budget = config["budget"]
    if height is None or width is None:
        return nearest_schedule(*(control_size or (1, 1)), budget)
    plan = nearest_schedule(height, width)
    if len(plan) > len(infinity_schedule("1.0", budget)):
        logger.warning("%dx%d is larger than what this model was made for (%s pixels)", width, height, budget)
    return plan


def _given(schedule: ScaleSchedule | Mapping[str, Any]) -> ScaleSchedule:
    if isinstance(schedule, ScaleSchedule):
        return schedule
    if not isinstance(schedule, Mapping) or "grids" not in schedule:
        raise ValueError(f"schedule is {schedule!r}; pass a ScaleSchedule or what its to_dict() gives")
    return ScaleSchedule.from_dict(schedule)
