"""From the fields of a request to an `Order`: everything checked, pictures decoded and brought to size.

Runs beside the drawing thread and only looks at the pipeline's settings. All headers are read first; then one control
image after the other is decoded, and what is left of it is its map at the size of the picture: what waits in the queue
stays small.
"""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from scaleweaver.control_maps import detector_of
from scaleweaver.controls.base import Preprocessor, at_short_side
from scaleweaver.guidance import per_scale
from scaleweaver.images import fit, read_image
from scaleweaver.request import read_schedule
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.schedule import ScaleSchedule, nearest_schedule
from scaleweaver.serve.errors import ApiError
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.orders import ControlSettings, Numbers, Order, Picture, Settings
from scaleweaver.serve.wire import ControlFields, RequestFields, parse

FORMATS = ("PNG", "JPEG", "WEBP")


class Reader:
    """Reads bodies for one pipeline; any number of threads may."""

    def __init__(self, pipe: Any, options: ServeOptions, name: str) -> None:
        """name: of the model, as clients call it."""
        self._pipe, self._options, self._name = pipe, options, name
        self._detectors: dict[str, Preprocessor] = {}
        self._detecting = threading.Lock()  # networks of preprocessors load once and run for one picture at a time

    def read(self, body: bytes) -> Order:
        fields = parse(body)
        if fields.model not in (None, self._name):
            message = f"the model {fields.model!r} is not served here; there is {self._name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        if fields.n > self._options.max_images:
            raise _wrong("n", f"{fields.n} pictures; this server draws up to {self._options.max_images} a request")
        sizes = [self._check(control, place) for place, control in enumerate(fields.controls)]
        plan = self._plan(fields, sizes[0] if sizes else None)
        previews = _previews(fields, len(plan))
        made = [self._control(control, place, plan, fields.size) for place, control in enumerate(fields.controls)]
        settings = Settings(
            plan=plan,
            guidance_scale=_number(fields.guidance_scale, plan, "guidance_scale"),
            control_guidance_scale=_number(fields.control_guidance_scale, plan, "control_guidance_scale"),
            guidance_layer=fields.guidance_layer,
            temperature=_number(fields.temperature, plan, "temperature"),
            top_k=fields.top_k,
            top_p=fields.top_p,
            has_negative=fields.negative_prompt is not None,
            controls=tuple(control for control, _, _ in made),
        )
        if settings.temperature is not None:
            try:
                BitwiseSampler(settings.temperature)
            except ValueError as error:
                raise _wrong("temperature", str(error)) from None
        seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
        pictures = [
            Picture(
                index=index,
                prompt=fields.prompt,
                seed=seed + index,
                negative_prompt=fields.negative_prompt,
                settings=settings,
                maps=[image for _, image, _ in made],
                masks=[mask for _, _, mask in made],
                previews=set(previews),
            )
            for index in range(fields.n)
        ]
        as_url = fields.response_format == "url"
        return Order(pictures, previews, fields.stream, fields.output_format, fields.output_compression, as_url)

    def _plan(self, fields: RequestFields, first: tuple[int, int] | None) -> ScaleSchedule:
        """The schedule of the picture; a size that the model does not draw is refused, not replaced."""
        config = self._pipe.config["schedule"]
        if fields.size == "auto":
            return read_schedule(None, config, None, None, first)
        width, height = map(int, fields.size.split("x"))
        plan = ScaleSchedule.from_dict(config) if "grids" in config else nearest_schedule(height, width)
        if (plan.width, plan.height) != (width, height):
            nearest = f"{plan.width}x{plan.height}"
            raise _wrong(
                "size", f'{fields.size} is no size of this model; pass "{nearest}", the nearest one, or "auto"'
            )
        if len(plan) > self._pipe.transformer.config["max_scales"]:
            raise _wrong("size", f'{fields.size} has more scales than this model draws; pass a smaller one, or "auto"')
        return plan

    def _check(self, fields: ControlFields, place: int) -> tuple[int, int]:
        """Refuse a control by what is known before anything is decoded; (height, width) of its image, upright."""
        adapters = self._pipe.controls
        if fields.kind not in adapters:
            there = ", ".join(adapters) or "none"
            raise _wrong(f"controls.{place}.kind", f"control {fields.kind!r} is not loaded; there is {there}")
        size = self._size(fields.image_b64, f"controls.{place}.image_b64")
        if fields.mask_b64:
            self._size(fields.mask_b64, f"controls.{place}.mask_b64")
        return size

    def _control(
        self, fields: ControlFields, place: int, plan: ScaleSchedule, size: str
    ) -> tuple[ControlSettings, Image.Image, Image.Image | None]:
        """Settings, map and mask of a control."""
        field = f"controls.{place}"
        image = self._decode(fields.image_b64, f"{field}.image_b64")
        if fields.preprocess:
            image = self._map_of(image, fields.kind, None if size == "auto" else min(plan.height, plan.width), field)
        image = _fit(image, plan, fields, f"{field}.image_b64")
        mask = self._decode(fields.mask_b64, f"{field}.mask_b64") if fields.mask_b64 else None
        if mask is not None:
            mask = _fit(mask, plan, fields, f"{field}.mask_b64", lines=False)
        settings = ControlSettings(
            kind=fields.kind,
            scale=_number(fields.scale, plan, f"{field}.scale"),
            start=fields.start,
            end=fields.end,
            scales=None if fields.scales is None else tuple(fields.scales),
            control_guidance_scale=_number(fields.control_guidance_scale, plan, f"{field}.control_guidance_scale"),
            resize=fields.resize,
            masked=mask is not None,
            all_black=mask is not None and mask.convert("L").getextrema() == (0, 0),
        )
        return settings, image, mask

    def _map_of(self, photo: Image.Image, kind: str, side: int | None, field: str) -> Image.Image:
        """What `map_of_photo` makes, with a detector that stays loaded."""
        config = self._pipe.controls[kind].config
        side = side or config.resolution
        factor = side / min(photo.size) if side else 1.0
        width, height = (round(length * factor) for length in photo.size)
        if width * height > self._options.max_pixels:
            raise self._too_large(f"{field}.image_b64", width, height, f" at a short side of {side}")
        try:
            with self._detecting:
                if kind not in self._detectors:
                    self._detectors[kind] = detector_of(config)
                return self._detectors[kind](at_short_side(photo, side) if side else photo)
        except ValueError as error:
            raise _wrong(field, str(error)) from None

    def _size(self, text: str, param: str) -> tuple[int, int]:
        """(height, width) of a picture once it is upright, by its header."""
        with self._opened(text, param) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            lies = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (image.width, image.height) if lies else (image.height, image.width)

    def _decode(self, text: str, param: str) -> Image.Image:
        with self._opened(text, param) as image:
            image.load()
            return read_image(image, param)

    @contextmanager
    def _opened(self, text: str, param: str) -> Iterator[Image.Image]:
        """A picture out of base64 or a data URL, refused by its header where it is too large."""
        try:
            file = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        except (binascii.Error, ValueError):
            raise _wrong(param, "not base64; send a PNG, JPEG or WebP file in base64, or a data URL") from None
        try:
            with Image.open(io.BytesIO(file), formats=FORMATS) as opened:
                if opened.width * opened.height > self._options.max_pixels:
                    raise self._too_large(param, opened.width, opened.height)
                yield opened
        except Image.DecompressionBombError:
            message = f"more than {self._options.max_pixels:,} pixels; scale it down"
            raise _wrong(param, message, code="image_too_large") from None
        except UnidentifiedImageError:
            raise _wrong(param, "no picture that can be read; send a PNG, JPEG or WebP file") from None
        except (OSError, SyntaxError, EOFError, ValueError) as error:
            raise _wrong(param, f"damaged or truncated ({error}); export it again") from None

    def _too_large(self, param: str, width: int, height: int, where: str = "") -> ApiError:
        message = f"{width}x{height}{where}, more than {self._options.max_pixels:,} pixels; scale it down"
        return _wrong(param, message, code="image_too_large")


def _fit(
    image: Image.Image, plan: ScaleSchedule, fields: ControlFields, param: str, *, lines: bool = True
) -> Image.Image:
    """A control image at the size of the picture."""
    try:
        return fit(image, plan.height, plan.width, fields.resize, lines=lines, name=param)
    except ValueError as error:
        message = f"{image.width}x{image.height} does not go into {plan.width}x{plan.height} ({error})"
        raise _wrong(param, f'{message}; pass resize="crop", or a picture that is less long') from None


def _previews(fields: RequestFields, scales: int) -> tuple[int, ...]:
    """The scales after which a picture is sent, spread evenly over those before the last."""
    count = fields.partial_images
    if count and not fields.stream:
        raise _wrong("partial_images", "they come while a picture is drawn; pass stream as true with it")
    if count >= scales:
        raise _wrong("partial_images", f"{count}, but there are {scales - 1} scales before the last; pass no more")
    return tuple((number + 1) * scales // (count + 1) - 1 for number in range(count))


def _number(value: float | list[float] | None, plan: ScaleSchedule, name: str) -> Any:
    """A number, or one per scale."""
    if value is None:
        return None
    try:
        per_scale(value, len(plan), name)
    except ValueError as error:
        raise _wrong(name, str(error)) from None
    numbers: Numbers = tuple(value) if isinstance(value, list) else value
    return numbers


def _wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {message}", code=code, param=param)
