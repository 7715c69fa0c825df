"""What goes over the wire: the fields of a request, and the JSON of answers, in the form of OpenAI's images API."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import replace
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scaleweaver.serve.errors import ApiError
from scaleweaver.serve.orders import Order

Scale = float | list[float]
MOST_CHARACTERS = 32_000  # of a prompt, as OpenAI has it


class ControlFields(BaseModel):
    """One control image and how strongly, when and where it acts; names are those of `scaleweaver.Control`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: str = Field(description="Name of a loaded control, as /v1/models lists them.")
    image_b64: str = Field(description="A PNG, JPEG or WebP file in base64, or as a data URL.")
    scale: Scale = Field(1.0, description="Strength: one number, or one per scale.")
    start: float = Field(0.0, ge=0, le=1, description="Where it sets in, as a fraction of the scales.")
    end: float = Field(1.0, ge=0, le=1, description="Where it ends.")
    scales: list[int] | None = Field(None, description="The scales where it acts, by number.")
    preprocess: bool = Field(False, description="The image is a photo: make the map from it first.")
    mask_b64: str | None = Field(None, description="White where it acts, black where not.")
    resize: Literal["crop", "pad", "stretch"] = "crop"
    control_guidance_scale: Scale | None = Field(None, description="Weigh this control apart; default: the call's.")


class RequestFields(BaseModel):
    """Body of POST /v1/images/generations: OpenAI's fields, then those of a scaleweaver call."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(max_length=MOST_CHARACTERS)
    model: str | None = Field(None, description="Default: the one that is served.")
    n: int = Field(1, ge=1, description="Pictures; picture i is drawn with seed + i.")
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT, or auto.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url gives a data: URL.")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, description="Pictures after earlier scales to send while it draws.")
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(None, description="Taken and not used.")

    negative_prompt: str | None = Field(None, max_length=MOST_CHARACTERS)
    seed: int | None = Field(None, ge=0, lt=2**63 - 1000, description="Default: a new one, which the answer tells.")
    guidance_scale: Scale | None = None
    control_guidance_scale: Scale | None = None
    guidance_layer: int | None = None
    temperature: Scale | None = None
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    controls: list[ControlFields] = Field([], max_length=8)


def parse(body: bytes) -> RequestFields:
    """The fields of a JSON body; the first that is wrong is what the client is told."""
    try:
        return RequestFields.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("float", "list[float]"))
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON ({first['msg']}); send one JSON object", code="invalid_json")
    if first["type"] == "extra_forbidden":
        known = ControlFields if place.startswith("controls.") else RequestFields
        message = f"{place} is no field here; there is {', '.join(known.model_fields)}"
        raise ApiError(400, message, code="unknown_parameter", param=place)
    raise ApiError(400, f"{place or 'the body'}: {first['msg']}", code="invalid_value", param=place or None)


def encode_picture(image: Image.Image, order: Order) -> str:
    """A picture as a file of the wanted format, in base64; its settings are inside."""
    file = io.BytesIO()
    options = {} if order.quality is None or order.output_format == "png" else {"quality": order.quality}
    image.save(file, order.output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def usage(order: Order, tokens: int) -> dict[str, Any]:
    """Tokens read of prompts, and tokens drawn."""
    drawn = sum(picture.settings.plan.length for picture in order.pictures)
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
        "output_tokens": drawn,
        "total_tokens": tokens + drawn,
    }


def answer(order: Order, images: list[str], tokens: int) -> bytes:
    """The body of a plain answer; images are in base64, in the order's sequence."""
    data = []
    for picture, image in zip(order.pictures, images, strict=True):
        entry: dict[str, Any] = {"seed": picture.seed}
        if order.as_url:
            entry["url"] = f"data:image/{order.output_format};base64,{image}"
        else:
            entry["b64_json"] = image
        data.append(entry)
    common = _common(order)
    return json.dumps({"created": int(time.time()), "data": data, **common, "usage": usage(order, tokens)}).encode()


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """One server-sent event whose data names its type too, as OpenAI's do."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def partial_event(order: Order, index: int, scale: int, image: str) -> bytes:
    number = order.previews.index(scale)
    fields = {"b64_json": image, "partial_image_index": number, "image_index": index, "created_at": int(time.time())}
    return event("image_generation.partial_image", {**fields, **_common(order), "quality": "auto"})


def completed_event(order: Order, index: int, image: str, tokens: int) -> bytes:
    fields = {
        "b64_json": image,
        "image_index": index,
        "seed": order.pictures[index].seed,
        "created_at": int(time.time()),
    }
    one = replace(order, pictures=[order.pictures[index]])
    return event(
        "image_generation.completed", {**fields, **_common(order), "quality": "auto", "usage": usage(one, tokens)}
    )


def _common(order: Order) -> dict[str, Any]:
    plan = order.pictures[0].settings.plan
    return {"size": f"{plan.width}x{plan.height}", "output_format": order.output_format, "background": "opaque"}
