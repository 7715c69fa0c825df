"""The control images of a call: checked and read first, encoded once, then handed to attention as injectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scaleweaver.contracts import Control, TextContext
from scaleweaver.images import fit, mask_tensor, read_image, to_tensor
from scaleweaver.methods.scaleweaver import ControlAdapter, encode
from scaleweaver.reference import ReferenceBank, ReferenceInjector, strengths
from scaleweaver.schedule import ScaleSchedule

TWO_LEVEL = ("opencv-canny",)  # detectors whose maps hold black and white alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedControl:
    """Control images of one kind, ready for any prompt and seed at one picture size.

    latent (n, d, Hl, Wl) has one row for all prompts or one per prompt. bank is None for adapters that also read the
    prompt.
    """

    kind: str
    latent: Tensor
    schedule: ScaleSchedule
    bank: ReferenceBank | None

    @classmethod
    def make(
        cls, kind: str, latent: Tensor, schedule: ScaleSchedule, transformer: Any, target: Any, adapter: ControlAdapter
    ) -> EncodedControl:
        """Run the condition stream of all scales over the latent, unless the adapter must wait for the prompt."""
        latent = latent.to(transformer.device)
        waits = adapter.config.condition_modulation != "null"
        bank = None if waits else encode(transformer, adapter, kind, latent, schedule, target)
        return cls(kind, latent, schedule, bank)

    def __len__(self) -> int:
        return len(self.latent)


def read_controls(control: Any, adapters: Mapping[str, ControlAdapter]) -> list[Control]:
    """Whatever `control=` was, as controls whose images are lists of RGB pictures, or an EncodedControl as it is."""
    if control is None:
        return []
    if isinstance(control, Mapping):
        named = [
            replace(value, kind=kind) if isinstance(value, Control) else Control(kind, value)
            for kind, value in control.items()
        ]
    else:
        named = [control] if isinstance(control, Control) else control
    if not isinstance(named, Sequence) or not all(isinstance(item, Control) for item in named):
        raise ValueError(
            f'control is a {type(control).__name__}; pass {{"canny": image}}, a Control or a list of Control'
        )
    return [_read(item, adapters) for item in named]


def _read(control: Control, adapters: Mapping[str, ControlAdapter]) -> Control:
    name = f'control "{control.kind}"'
    if control.kind not in adapters:
        raise ValueError(
            f"{name} is not loaded; there is {', '.join(adapters) or 'none'}: load it with pipe.load_control"
        )
    if control.resize not in ("crop", "pad", "stretch"):
        raise ValueError(f'{name} has resize={control.resize!r}; pass "crop", "pad" or "stretch"')
    mask = None if control.mask is None else read_image(control.mask, f"mask of {name}")
    if isinstance(control.image, EncodedControl):
        if control.image.kind != control.kind:
            raise ValueError(f'{name} got an image encoded as "{control.image.kind}"; encode it for {control.kind!r}')
        return replace(control, mask=mask)
    images = control.image if isinstance(control.image, list | tuple) else [control.image]
    if not images:
        raise ValueError(f"{name} got an empty list; pass one image, or one per prompt")
    pictures = [read_image(image, f"{name} image") for image in images]
    if adapters[control.kind].config.detector in TWO_LEVEL and any(map(_has_tones, pictures)):
        logger.warning(
            "%s got a picture with many tones where it expects lines on black: if it is a photo, take its edges first, "
            "with scaleweaver.controls or --preprocess",
            name,
        )
    return replace(control, image=pictures, mask=mask)


def _has_tones(picture: Image.Image) -> bool:
    """Whether most of a picture is neither black nor white, unlike any edge map, resized or not."""
    counts = picture.convert("L").histogram()
    return sum(counts[32:224]) > sum(counts) / 2


def first_size(controls: Sequence[Control]) -> tuple[int, int] | None:
    """(height, width) of the first control's image, None without one."""
    for control in controls:
        if isinstance(control.image, EncodedControl):
            return control.image.schedule.height, control.image.schedule.width
        return control.image[0].height, control.image[0].width
    return None


def encode_pictures(control: Control, schedule: ScaleSchedule, vae: Any) -> Tensor:
    """Tokenizer latents (n, d, Hl, Wl) of a control's pictures, each fitted to the schedule's size."""
    rows = []
    for picture in control.image:
        fitted = _fit(picture, control, schedule)
        rows.append(vae.encode(to_tensor(fitted)[None].to(vae.device)))  # (1, d, Hl, Wl)
    return torch.cat(rows)  # (n, d, Hl, Wl)


def _fit(picture: Image.Image, control: Control, schedule: ScaleSchedule) -> Image.Image:
    height, width = schedule.height, schedule.width
    if control.resize == "crop" and abs(picture.width * height / (picture.height * width) - 1) > 0.02:
        logger.warning(
            'control "%s" is %dx%d but the picture %dx%d: what sticks out is cut off; pass resize="pad" to keep it all',
            *(control.kind, *picture.size, width, height),
        )
    return fit(picture, height, width, control.resize, name=f'control "{control.kind}"')


def make_injector(
    control: Control,
    encoded: EncodedControl,
    transformer: Any,
    target: Any,
    adapter: ControlAdapter,
    *,
    text: TextContext,
    schedule: ScaleSchedule,
    sees_control: Sequence[bool],
    images_per_prompt: int,
) -> ReferenceInjector:
    """The injector of one control for the rows of `text`: branches * prompts * images_per_prompt."""
    images = len(text.pooled) // len(sees_control)
    prompts = images // images_per_prompt
    device = text.pooled.device
    if len(encoded) not in (1, prompts):
        raise ValueError(
            f'control "{control.kind}" has {len(encoded)} images for {prompts} prompts; pass 1 or {prompts}'
        )
    if encoded.schedule.full_grids != schedule.full_grids:
        raise ValueError(
            f'control "{control.kind}" was encoded for {encoded.schedule.width}x{encoded.schedule.height}, the picture'
            f" is {schedule.width}x{schedule.height}; encode it again for this size"
        )
    rows = torch.arange(len(encoded)).repeat_interleave(images_per_prompt if len(encoded) > 1 else 1)  # (1 | images,)
    if encoded.bank is not None:
        bank = encoded.bank.to(device).select_rows(rows)
    else:
        latent = encoded.latent[rows].to(device)  # (1 | images, d, Hl, Wl)
        bank = encode(transformer, adapter, control.kind, latent, schedule, target, text)
    mask = None
    if control.mask is not None:
        mask = mask_tensor(control.mask, schedule.height, schedule.width, control.resize)[None, None]  # (1, 1, H, W)
    values = control_strengths(control, schedule)
    return ReferenceInjector(bank, adapter, values, sees_control, mask=mask, images=images)


def control_strengths(control: Control, schedule: ScaleSchedule) -> tuple[float, ...]:
    """Strength per scale, zero outside the window; errors name the control."""
    try:
        return strengths(control.scale, len(schedule), start=control.start, end=control.end)
    except (ValueError, TypeError) as error:
        raise ValueError(f'control "{control.kind}": {error}') from None
