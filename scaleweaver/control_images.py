"""The controls of a call: read and checked, settled for its schedule, encoded once, then injectors of attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scaleweaver.contracts import Control, TextContext
from scaleweaver.guidance import per_scale
from scaleweaver.images import fit, mask_tensor, read_image, to_tensor
from scaleweaver.methods.scaleweaver import ControlAdapter, encode
from scaleweaver.reference import ReferenceBank, ReferenceInjector, scale_indices, strengths
from scaleweaver.schedule import ScaleSchedule

TWO_LEVEL = ("opencv-canny",)  # detectors whose maps hold black and white alone
ON_BLACK = ("pose",)  # kinds whose maps are drawn on a black ground

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedControl:
    """Control images of one kind, ready for any prompt and seed at one picture size.

    latent (n, d, Hl, Wl) has one row for all prompts or one per prompt. bank is None for adapters that also read the
    prompt. edition: the adapter's weights that it was made with.
    """

    kind: str
    latent: Tensor
    schedule: ScaleSchedule
    bank: ReferenceBank | None
    edition: str

    @classmethod
    def make(
        cls, kind: str, latent: Tensor, schedule: ScaleSchedule, transformer: Any, target: Any, adapter: ControlAdapter
    ) -> EncodedControl:
        """Run the condition stream of all scales over the latent, unless the adapter must wait for the prompt."""
        latent = latent.to(transformer.device)
        waits = adapter.config.condition_modulation != "null"
        bank = None if waits else encode(transformer, adapter, kind, latent, schedule, target)
        return cls(kind, latent, schedule, bank, adapter.edition)

    @classmethod
    def join(cls, parts: Sequence[EncodedControl]) -> EncodedControl:
        """Several as one, for one prompt each."""
        first, *others = parts
        if not others:
            return first
        for part in others:
            if (part.kind, part.edition, part.schedule) != (first.kind, first.edition, first.schedule):
                raise ValueError(
                    f"a list mixes controls that were encoded as {first.kind!r} for {first.schedule.width}x"
                    f"{first.schedule.height} and as {part.kind!r} for {part.schedule.width}x{part.schedule.height}, "
                    "or with other weights; encode them alike"
                )
        banks = [part.bank for part in parts if part.bank is not None]
        bank = ReferenceBank.join(banks) if banks else None
        return replace(first, latent=torch.cat([part.latent for part in parts]), bank=bank)

    def __len__(self) -> int:
        return len(self.latent)


def read_controls(control: Any, adapters: Mapping[str, ControlAdapter]) -> list[Control]:
    """Whatever `control=` was, as controls whose images (and masks) are lists of RGB pictures, or an EncodedControl."""
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
    masks = None if control.mask is None else [read_image(mask, f"mask of {name}") for mask in _each(control.mask)]
    images = _each(control.image)
    if not images or masks == []:
        raise ValueError(f"{name} got an empty list; pass one image, or one per prompt")
    if all(isinstance(image, EncodedControl) for image in images):
        return replace(control, image=_checked(EncodedControl.join(images), control.kind, adapters), mask=masks)
    pictures = [read_image(image, f"{name} image") for image in images]
    _warn_of_photos(pictures, adapters[control.kind], name)
    return replace(control, image=pictures, mask=masks)


def _each(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]


def _checked(encoded: EncodedControl, kind: str, adapters: Mapping[str, ControlAdapter]) -> EncodedControl:
    if encoded.kind != kind:
        raise ValueError(f'control "{kind}" got an image encoded as "{encoded.kind}"; encode it for {kind!r}')
    if encoded.edition != adapters[kind].edition:
        raise ValueError(
            f'control "{kind}" got an image encoded with weights that were replaced since; encode it again'
        )
    return encoded


def _warn_of_photos(pictures: Sequence[Image.Image], adapter: ControlAdapter, name: str) -> None:
    expected = ""
    if adapter.config.detector in TWO_LEVEL and any(map(_has_tones, pictures)):
        expected = "with many tones where it expects lines on black"
    elif adapter.config.kind in ON_BLACK and not all(map(_is_mostly_black, pictures)):
        expected = "that is not mostly black where it expects a drawing on black"
    if expected:
        logger.warning(
            "%s got a picture %s: if it is a photo, make its map first, with scaleweaver.controls or --preprocess",
            *(name, expected),
        )


def _has_tones(picture: Image.Image) -> bool:
    """Whether most of a picture is neither black nor white, unlike any edge map, resized or not."""
    counts = picture.convert("L").histogram()
    return sum(counts[32:224]) > sum(counts) / 2


def _is_mostly_black(picture: Image.Image) -> bool:
    counts = picture.convert("L").histogram()
    return sum(counts[:32]) > sum(counts) / 2


def first_size(controls: Sequence[Control]) -> tuple[int, int] | None:
    """(height, width) of the first control's image, None without one."""
    for control in controls:
        if isinstance(control.image, EncodedControl):
            return control.image.schedule.height, control.image.schedule.width
        return control.image[0].height, control.image[0].width
    return None


def settle(control: Control, schedule: ScaleSchedule, prompts: int) -> Control:
    """A read control with plain numbers and masks for one schedule, checked against the number of prompts.

    What a function gave for each scale, the indices of a slice, masks (1 | prompts, 1, H, W).
    """
    name = f'control "{control.kind}"'
    for count, what in ((len(control.image), "images"), (len(control.mask or [None]), "masks")):
        if count not in (1, prompts):
            many = f" for {prompts} prompts; pass 1 or {prompts}" if prompts > 1 else " for one prompt; pass one"
            raise ValueError(f"{name} has {count} {what}{many}")
    encoded = control.image.schedule if isinstance(control.image, EncodedControl) else schedule
    if encoded.full_grids != schedule.full_grids:
        raise ValueError(
            f"{name} was encoded for {encoded.width}x{encoded.height}, the picture is {schedule.width}x"
            f"{schedule.height}; encode it again for this size"
        )
    masks = control.mask
    if masks is not None:
        sized = [mask_tensor(mask, schedule.height, schedule.width, control.resize) for mask in masks]  # each (H, W)
        masks = torch.stack(sized)[:, None]  # (1 | prompts, 1, H, W)
    # outside of the try: what goes wrong in a caller's own function shows as it is
    scale = [control.scale(step) for step in schedule] if callable(control.scale) else control.scale
    try:
        settled = replace(
            control,
            scale=scale,
            scales=None if control.scales is None else scale_indices(control.scales, len(schedule)),
            mask=masks,
        )
        within, anywhere = control_strengths(settled, schedule), strengths(scale, len(schedule))
        if any(anywhere) and not any(within):
            logger.warning("%s acts at none of the %d scales: widen start, end or scales", name, len(schedule))
        if control.control_guidance_scale is not None:
            per_scale(control.control_guidance_scale, len(schedule), "control_guidance_scale")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return settled


def acts(control: Control, schedule: ScaleSchedule) -> bool:
    """Whether a settled control changes anything."""
    return any(control_strengths(control, schedule)) and (control.mask is None or bool(control.mask.any()))


def control_strengths(control: Control, schedule: ScaleSchedule) -> tuple[float, ...]:
    """Strength per scale of a settled control, zero where it is not active."""
    assert not callable(control.scale) and not isinstance(control.scales, slice)
    return strengths(control.scale, len(schedule), start=control.start, end=control.end, among=control.scales)


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
    """The injector of one settled control for the rows of `text`: branches * prompts * images_per_prompt."""
    images, device = len(text.pooled) // len(sees_control), text.pooled.device
    rows = _image_rows(len(encoded), images_per_prompt)  # (1 | images,)
    if encoded.bank is not None:
        bank = encoded.bank.to(device).select_rows(rows)
    else:
        latent = encoded.latent[rows].to(device)  # (1 | images, d, Hl, Wl)
        bank = encode(transformer, adapter, control.kind, latent, schedule, target, text)
    mask = control.mask
    if mask is not None:
        mask = mask[_image_rows(len(mask), images_per_prompt)]  # (1 | images, 1, H, W)
    values = control_strengths(control, schedule)
    return ReferenceInjector(bank, adapter, values, sees_control, mask=mask, images=images)


def _image_rows(count: int, images_per_prompt: int) -> Tensor:
    """Which of `count` rows every image reads, (images,); one row serves all and stays one."""
    return torch.arange(count).repeat_interleave(images_per_prompt if count > 1 else 1)
