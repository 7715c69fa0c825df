"""OpenAI's own client against the real server: what it draws is what the pipeline draws."""

from __future__ import annotations

import base64
import io
import json
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import APIError, BadRequestError, NotFoundError, OpenAI
from PIL import Image
from serve_clients import assert_same, b64, client, get, metric, picture, post
from tiny_pipeline import PROMPT, edges, tiny_pipeline

from scaleweaver.contracts import Control
from scaleweaver.controls import canny
from scaleweaver.metadata import read_settings
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.serve import reading
from scaleweaver.serve.errors import ApiError
from scaleweaver.serve.options import ServeOptions, public_name
from scaleweaver.serve.reading import Reader
from scaleweaver.serve.server import running

same = partial(assert_same, model="tiny")


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline("canny", "depth")


@pytest.fixture(scope="module")
def url(pipe: VARControlPipeline) -> Iterator[str]:
    with running(pipe, ServeOptions(name="tiny", max_body=200_000, max_pixels=10_000)) as address:
        yield address


@pytest.fixture(scope="module")
def api(url: str) -> OpenAI:
    return client(url)


def test_pictures_are_those_of_the_pipeline(api: OpenAI, pipe: VARControlPipeline) -> None:
    answer = api.images.generate(prompt=PROMPT, n=3, model="tiny", extra_body={"seed": 5})
    assert answer.data is not None and answer.usage is not None
    for number, one in enumerate(answer.data):
        assert one.seed == 5 + number  # type: ignore[attr-defined]
        same(one.b64_json, pipe(PROMPT, seed=5 + number).images[0])
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
    words = len(PROMPT.split()) + 1  # and the end of the text
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3 * words, 3 * 30)


def test_every_setting_of_a_call_arrives(api: OpenAI, pipe: VARControlPipeline) -> None:
    settings = {
        "negative_prompt": "a tree",
        "guidance_scale": [1.0, 2.0, 3.0, 4.0],
        "temperature": 0.7,
        "top_k": 2,
        "top_p": 0.9,
    }
    answer = api.images.generate(prompt=PROMPT, size="32x32", extra_body={**settings, "seed": 3})
    assert answer.data is not None
    same(answer.data[0].b64_json, pipe(PROMPT, seed=3, **settings).images[0])  # type: ignore[arg-type]
    inside = api.images.generate(prompt=PROMPT, extra_body={"guidance_layer": -2, "seed": 3})
    assert inside.data is not None
    same(inside.data[0].b64_json, pipe(PROMPT, seed=3, guidance_layer=-2).images[0])


def test_controls_arrive_with_strength_window_mask_and_guidance(api: OpenAI, pipe: VARControlPipeline) -> None:
    lines, tones, mask = edges(1), edges(2, (40, 32)), edges(3)
    fields = [
        {"kind": "canny", "image_b64": b64(lines), "scale": [0.5, 1.0, 1.0, 0.0], "mask_b64": b64(mask)},
        {
            "kind": "depth",
            "image_b64": "data:image/webp;base64," + b64(tones, "WEBP"),
            "start": 0.25,
            "end": 0.75,
            "resize": "pad",
            "control_guidance_scale": 2.0,
        },
    ]
    decoded = Image.open(io.BytesIO(base64.b64decode(b64(tones, "WEBP"))))
    controls = [
        Control("canny", lines, scale=[0.5, 1.0, 1.0, 0.0], mask=mask),
        Control("depth", decoded, start=0.25, end=0.75, resize="pad", control_guidance_scale=2.0),
    ]
    answer = api.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 4, "controls": fields})
    assert answer.data is not None
    for number, one in enumerate(answer.data):
        same(one.b64_json, pipe(PROMPT, seed=4 + number, control=controls).images[0])
    plain = pipe(PROMPT, seed=4).images[0]
    assert not np.array_equal(np.asarray(picture(answer.data[0].b64_json)), np.asarray(plain))


def test_a_photo_becomes_the_map_of_its_control(api: OpenAI, pipe: VARControlPipeline) -> None:
    rows, columns = np.mgrid[:48, :48]
    disc = ((rows - 24) ** 2 + (columns - 24) ** 2 < 200)[..., None]
    photo = Image.fromarray(np.where(disc, [250, 40, 30], [20, 90, 200]).astype(np.uint8))
    control = {"kind": "canny", "image_b64": b64(photo), "preprocess": True}
    answer = api.images.generate(prompt=PROMPT, extra_body={"seed": 2, "controls": [control]})
    assert answer.data is not None
    same(answer.data[0].b64_json, pipe(PROMPT, seed=2, control={"canny": canny(photo)}).images[0])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats_keep_the_settings(api: OpenAI, form: str) -> None:
    answer = api.images.generate(
        prompt=PROMPT,
        output_format=form,  # type: ignore[call-overload]
        output_compression=80,
        response_format="url",
        extra_body={"seed": 9},
    )
    head, _, data = answer.data[0].url.partition(",")
    assert head == f"data:image/{form};base64"
    assert picture(data).format == form.upper()
    assert read_settings(picture(data))["seed"] == 9


def test_stream_sends_previews_and_then_the_picture(api: OpenAI, pipe: VARControlPipeline) -> None:
    seen: list[Image.Image] = []
    drawn = pipe(PROMPT, seed=6, callback_on_step_end=lambda p, i, s, v: seen.extend(v["preview"]()))
    events = list(api.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 6}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    for number, event in enumerate(events[:3]):
        assert event.type == "image_generation.partial_image" and event.partial_image_index == number
        assert np.array_equal(np.asarray(picture(event.b64_json)), np.asarray(seen[number]))
    assert events[3].type == "image_generation.completed" and events[3].usage.output_tokens == 30
    same(events[3].b64_json, drawn.images[0])


def test_stream_of_several_pictures_names_each(api: OpenAI, pipe: VARControlPipeline) -> None:
    events = list(api.images.generate(prompt=PROMPT, n=2, stream=True, partial_images=1, extra_body={"seed": 1}))
    finished = {event.image_index: event for event in events if event.type == "image_generation.completed"}  # type: ignore[union-attr]
    assert len(events) == 4 and sorted(finished) == [0, 1]
    for number, event in finished.items():
        same(event.b64_json, pipe(PROMPT, seed=1 + number).images[0])


def test_an_error_after_the_stream_began_is_an_event(url: str) -> None:
    with pytest.raises(APIError, match="guidance_layer is 99"):
        list(client(url).images.generate(stream=True, prompt=PROMPT, extra_body={"guidance_layer": 99}))


THIN = b64(Image.new("L", (1000, 1), 255))
WRONG = [
    ({}, "prompt", "Field required"),
    ({"prompt": 3}, "prompt", "valid string"),
    ({"prompt": "x" * 32_001}, "prompt", "32000"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 11}, "n", "up to 10"),
    ({"size": "big"}, "size", "pattern"),
    ({"size": "1024x1024"}, "size", '"32x32"'),
    ({"quality": "hd"}, "quality", "'auto'"),
    ({"steps": 30}, "steps", "there is prompt, model"),
    ({"seed": -1}, "seed", "greater"),
    ({"temperature": 0}, "temperature", "above 0"),
    ({"guidance_scale": [1, 2]}, "guidance_scale", "4 scales"),
    ({"top_p": 2}, "top_p", "less than or equal to 1"),
    ({"guidance_layer": 99}, None, "layers 0 to 2"),
    ({"partial_images": 2}, "partial_images", "stream"),
    ({"partial_images": 4, "stream": True}, "partial_images", "3 scales before the last"),
    ({"controls": [{"kind": "pose", "image_b64": b64(edges())}]}, "controls.0.kind", "there is canny, depth"),
    ({"controls": [{"kind": "canny", "image_b64": "%"}]}, "controls.0.image_b64", "not base64"),
    ({"controls": [{"kind": "canny", "image_b64": "AAAA"}]}, "controls.0.image_b64", "PNG, JPEG or WebP"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges(), "GIF")}]}, "controls.0.image_b64", "PNG, JPEG or WebP"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges())[:160]}]}, "controls.0.image_b64", "truncated"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges(), "PNG"), "weight": 1}]}, "controls.0.weight", "scale"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges()), "scale": [1]}]}, "controls.0.scale", "4 scales"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges()), "mask_b64": "AAAA"}]}, "controls.0.mask_b64", "PNG"),
    ({"controls": [{"kind": "canny", "image_b64": b64(edges())}] * 9}, "controls", "at most 8"),
    ({"controls": [{"kind": "canny", "image_b64": THIN, "resize": "pad"}]}, "controls.0.image_b64", "1000x1 does not"),
    (
        {"controls": [{"kind": "canny", "image_b64": b64(edges()), "mask_b64": THIN, "resize": "pad"}]},
        "controls.0.mask_b64",
        "1000x1 does not go",
    ),
    (
        {"size": "32x32", "controls": [{"kind": "canny", "image_b64": THIN, "preprocess": True}]},
        "controls.0.image_b64",
        "32000x32 at a short side of 32, more than 10,000 pixels",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=[f"{p}-{w[:12]}" for _, p, w in WRONG])
def test_refusals_say_what_to_pass(url: str, fields: dict[str, object], param: str | None, words: str) -> None:
    body = {"prompt": PROMPT, **fields} if fields else {}
    status, answer, _ = post(url, body)
    assert status == 400
    error = answer["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["code"]
    assert words in error["message"]


def test_a_picture_that_grows_on_decoding_is_refused_by_its_header(url: str) -> None:
    bomb = b64(Image.new("1", (8000, 8000)))
    assert len(bomb) < 20_000
    status, answer, _ = post(url, {"prompt": PROMPT, "controls": [{"kind": "canny", "image_b64": bomb}]})
    assert (status, answer["error"]["code"]) == (400, "image_too_large")
    assert "8000x8000, more than 10,000 pixels" in answer["error"]["message"]


def body(*images: str, **fields: object) -> bytes:
    controls = [{"kind": "canny", "image_b64": image} for image in images]
    return json.dumps({"prompt": PROMPT, "controls": controls, **fields}).encode()


def test_all_headers_are_read_before_anything_is_decoded(pipe: VARControlPipeline) -> None:
    reader = Reader(pipe, ServeOptions(max_pixels=10_000), "tiny")
    damaged, large = b64(edges())[:160], b64(Image.new("1", (8000, 8000)))
    with pytest.raises(ApiError, match="8000x8000, more than 10,000 pixels") as refused:
        reader.read(body(damaged, large))
    assert refused.value.param == "controls.1.image_b64"


def test_control_images_are_decoded_one_after_the_other(
    pipe: VARControlPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []
    read_image = reading.read_image

    def watched(*arguments: Any) -> Image.Image:
        image = read_image(*arguments)
        decoded.append(weakref.ref(image))
        alive.append(sum(one() is not None for one in decoded))
        return image

    monkeypatch.setattr(reading, "read_image", watched)
    (drawn,) = Reader(pipe, ServeOptions(), "tiny").read(body(*[b64(edges(1, (80, 80)))] * 4)).pictures
    assert [one.size for one in drawn.maps] == [(32, 32)] * 4
    assert len(alive) == 4 and max(alive) <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_of_a_turned_photo_is_read_upright(orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 30)).save(file, "JPEG", exif=exif)
    pipe = tiny_pipeline("canny", schedule={"family": "infinity", "budget": "0.06M"})
    (drawn,) = Reader(pipe, ServeOptions(), "tiny").read(body(base64.b64encode(file.getvalue()).decode())).pictures
    plan = drawn.settings.plan
    assert (plan.height < plan.width) == (orientation == 1) and plan.height != plan.width


def test_only_json_is_read(url: str) -> None:
    """Other types may be sent from a page of any site without asking this server first."""
    fields = json.dumps({"prompt": PROMPT}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, answer, _ = post(url, fields, content_type=kind)
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    assert post(url, fields, content_type="application/json; charset=utf-8")[0] == 200


def test_fields_are_listed_without_a_page_that_loads_scripts(url: str) -> None:
    listed = json.loads(get(f"{url}/openapi.json")[1])
    schema = listed["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "controls", "guidance_scale"} <= set(schema["properties"])
    assert get(f"{url}/docs")[0] == get(f"{url}/redoc")[0] == 404


def test_clients_see_no_path_of_the_server(pipe: VARControlPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "mine")
    loaded = VARControlPipeline.from_pretrained(tmp_path / "mine")
    loaded.set_progress_bar_config(disable=True)
    settings = read_settings(loaded(PROMPT, seed=1).images[0])
    assert settings["model"] == str(tmp_path / "mine")
    with running(loaded) as url:
        drawn = post(url, {"prompt": PROMPT, "seed": 1})[1]["data"][0]["b64_json"]
        assert read_settings(picture(drawn)) == {**settings, "model": "mine"}
        for seen in (get(f"{url}/health")[1], get(f"{url}/v1/models")[1], get(f"{url}/openapi.json")[1]):
            assert str(tmp_path) not in seen
        assert json.loads(get(f"{url}/v1/models")[1])["data"][0]["id"] == "mine"


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "repo").mkdir(parents=True)
    assert public_name(f"{tmp_path}/user/repo/") == "repo"
    assert public_name("someone/else") == "someone/else"
    monkeypatch.chdir(tmp_path / "user")
    assert public_name(".") == "user"


def test_what_is_no_json_and_what_is_no_route(url: str, api: OpenAI) -> None:
    for body, words in (
        (b"{", "not JSON"),
        (b"[]", "the body"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ):
        status, answer, _ = post(url, body)
        assert status == 400 and words in answer["error"]["message"]
    with pytest.raises(NotFoundError, match="served here"):
        api.images.generate(prompt=PROMPT, model="dall-e-3")
    assert get(f"{url}/v1/chat")[0] == 404
    assert json.loads(get(f"{url}/v1/images/generations")[1])["error"]["code"] == "not_found"


def test_models_tell_controls_and_sizes(api: OpenAI) -> None:
    (model,) = api.models.list().data
    assert (model.id, model.controls, model.sizes, model.scales) == ("tiny", ["canny", "depth"], ["32x32"], 4)  # type: ignore[attr-defined]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(NotFoundError, match="'other'"):
        api.models.retrieve("other")


def test_health_metrics_and_ids(url: str, api: OpenAI) -> None:
    assert json.loads(get(f"{url}/health")[1]) == {"status": "ok", "model": "tiny", "waiting": 0}
    before = metric(url, "scaleweaver_images_total")
    api.images.generate(prompt=PROMPT, n=2)
    assert metric(url, "scaleweaver_images_total") == before + 2
    assert metric(url, "scaleweaver_active_requests") == 0
    assert post(url, {"prompt": PROMPT}, x_request_id="mine-1")[2]["x-request-id"] == "mine-1"
    with pytest.raises(BadRequestError) as refused:
        api.images.generate(prompt=PROMPT, n=11, extra_headers={"x-request-id": "bad id\x7f"})
    assert refused.value.request_id is not None and len(refused.value.request_id) == 32
