"""How a picture was made, kept inside its file: settings as JSON in a PNG text chunk, or in EXIF for JPEG and WebP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

KEY = "scaleweaver"
_IMAGE_DESCRIPTION = 0x010E  # the EXIF text tag that every viewer shows
# arguments of a call that settings name as they are; of the others `python_of` makes lines of their own
ARGUMENTS = (
    "seed", "negative_prompt", "height", "width", "guidance_scale", "control_guidance_scale", "guidance_layer",
    "temperature", "top_k", "top_p", "stop_after", "schedule",
)  # fmt: skip
_PARTS = ("cache", "router", "sampler", "search")
_ELSEWHERE = ("model", "dtype", "quantize", "loras", "forced", "prompt", "control")
_File = str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes]


class Picture(Image.Image):
    """A PIL image whose `save` writes its settings into PNG, JPEG and WebP files.

    PIL itself drops `image.info` on saving. Crops, copies and conversions are plain PIL images, whose files carry no
    settings: they are no longer what the settings would make. In memory PIL hands `info` on to them.
    """

    @property
    def settings(self) -> dict[str, Any]:
        return dict(json.loads(self.info[KEY])) if KEY in self.info else {}

    def save(self, fp: _File, format: str | None = None, **params: Any) -> None:
        if KEY in self.info:
            for name, value in _file_metadata(self.info[KEY], _format_of(fp, format)).items():
                params.setdefault(name, value)
        super().save(fp, format, **params)


def write_settings(image: Image.Image, settings: dict[str, Any]) -> Picture:
    """The same pixels as a `Picture` that carries the settings; they must be JSON."""
    try:
        text = json.dumps(settings, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings cannot be written into a picture: {error}; pass plain numbers, strings and lists"
        ) from None
    picture = Picture()
    picture.__setstate__(image.__getstate__())
    picture.info = {**image.info, KEY: text}
    return picture


def read_settings(source: str | os.PathLike[str] | Image.Image) -> dict[str, Any]:
    """The settings inside an image file (or an opened image), as `write_settings` put them there."""
    if isinstance(source, Image.Image):
        return _parse(source, "image")
    if not os.path.isfile(source):
        raise ValueError(f"there is no file {os.fspath(source)!r}; check the path")
    try:
        with Image.open(source) as image:
            return _parse(image, repr(os.fspath(source)))
    except UnidentifiedImageError:
        raise ValueError(
            f"{os.fspath(source)!r} is not an image file; pass a PNG, JPEG or WebP made by this package"
        ) from None


def _parse(image: Image.Image, name: str) -> dict[str, Any]:
    text = image.info.get(KEY)
    if text is None:
        description = image.getexif().get(_IMAGE_DESCRIPTION, "")
        text = description.removeprefix(f"{KEY}:") if str(description).startswith(f"{KEY}:") else None
    if text is None:
        raise ValueError(
            f"{name} carries no settings; only files saved from this package's pictures do,"
            " and editors and chat services usually strip them"
        )
    try:
        settings = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the settings in {name} are damaged ({error}); expected JSON") from None
    if not isinstance(settings, dict):
        raise ValueError(f"the settings in {name} are a {type(settings).__name__}; expected a JSON object")
    return settings


def _format_of(fp: _File, format: str | None) -> str:
    if format is not None:
        return format.upper()
    path = fp if isinstance(fp, str | bytes | os.PathLike) else getattr(fp, "name", "")
    if not isinstance(path, str | bytes | os.PathLike):
        return ""  # an unnamed temporary file is called by its number
    extensions = Image.registered_extensions()  # also loads the plugins
    return extensions.get(Path(os.fsdecode(path)).suffix.lower(), "")


def _file_metadata(text: str, format: str) -> dict[str, Any]:
    """The arguments of PIL's save that carry the text into a file of this format."""
    if format == "PNG":
        chunks = PngInfo()
        chunks.add_itxt(KEY, text)
        return {"pnginfo": chunks}
    if format in ("JPEG", "WEBP", "MPO"):
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION] = f"{KEY}:{text}"
        return {"exif": exif.tobytes()}
    return {}


def python_of(settings: dict[str, Any]) -> str:
    """The Python call that these settings stand for; a picture keeps no control images, so it names files to put.

    Anybody may have written the file that the settings are from: what is in them becomes literals, never code.
    """
    try:
        return "\n".join(_call(settings))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the settings are not those of a drawing ({error!r}); take a picture that this package has drawn"
        ) from None


def _call(settings: dict[str, Any]) -> list[str]:
    controls = settings.get("control", [])
    names = "Control, VARControlPipeline" if controls else "VARControlPipeline"
    dtype = f", dtype={settings['dtype']!r}" if "dtype" in settings else ""
    lines = [
        f"from scaleweaver import {names}",
        "",
        f"pipe = VARControlPipeline.from_pretrained({settings.get('model', 'toybox')!r}{dtype})",
    ]
    loras = {lora["name"]: lora for lora in settings.get("loras", [])}
    lines += [f"pipe.quantize({settings['quantize']!r})"] if "quantize" in settings else []
    lines += [f"pipe.load_lora_weights({lora['source']!r}, {name!r})" for name, lora in loras.items()]
    weights = [lora["weight"] for lora in loras.values()]
    lines += [f"pipe.set_adapters({list(loras)!r}, {weights!r})"] if loras else []
    # parts that were given as objects are known by their names only
    lines += [f"# drawn with {name}={settings[name]!r}" for name in _PARTS if name in settings]
    lines += [f"# drawn with {settings['forced']!r} scales of given codes (forced)"] if "forced" in settings else []
    unknown = [name for name in settings if name not in (*_ELSEWHERE, *_PARTS, *ARGUMENTS)]
    lines += [f"# settings that this version does not know: {unknown!r}"] if unknown else []
    if "prompt" in settings:
        lines += ["out = pipe(", f"    {settings['prompt']!r},"]
    else:
        lines += ["# drawn from prompt_embeds, which no picture keeps: put them here", "out = pipe("]
    lines += [f"    {name}={value!r}," for name, value in settings.items() if name in ARGUMENTS]
    if controls:
        lines.append("    # no picture keeps its control images: put the maps that it was drawn under into these files")
        lines.append("    control=[")
        for control in controls:
            kept = ("scale", "start", "end", "scales", "control_guidance_scale", "resize")
            words = [f"{name}={control[name]!r}" for name in kept if name in control]
            words += ['mask="mask.png"'] if control.get("masked") else []
            lines.append(f"        Control({control['kind']!r}, {control['kind'] + '.png'!r}, {', '.join(words)}),")
        lines.append("    ],")
    return [*lines, ")"]
