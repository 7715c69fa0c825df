from __future__ import annotations

import ast
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_pipeline import PROMPT, edges, tiny_pipeline

from scaleweaver.cache import FullCache
from scaleweaver.metadata import ARGUMENTS, KEY, Picture, python_of, read_settings, write_settings
from scaleweaver.pipeline import VARControlPipeline

SETTINGS: dict[str, Any] = {
    "prompt": 'a "red" cube, größer als 東京 🙂',
    "seed": 2**63 - 1,
    "guidance_scale": [1.0, 3.5],
    "control": [],
}


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def test_plain_save_embeds_the_settings(tmp_path: Path) -> None:
    picture = write_settings(image(), SETTINGS)
    picture.save(tmp_path / "x.png")
    assert read_settings(tmp_path / "x.png") == SETTINGS
    with Image.open(tmp_path / "x.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(image()))
    assert picture.settings == SETTINGS and picture.mode == "RGB" and picture.size == (24, 16)


@pytest.mark.parametrize(
    ("name", "format"), [("x.jpg", None), ("x.webp", None), ("x.unknown", "JPEG"), ("x.bin", "png")]
)
def test_other_formats(tmp_path: Path, name: str, format: str | None) -> None:
    write_settings(image(), SETTINGS).save(tmp_path / name, format=format, quality=80)
    assert read_settings(str(tmp_path / name)) == SETTINGS


def test_into_memory_and_opened_images() -> None:
    buffer = io.BytesIO()
    write_settings(image(), SETTINGS).save(buffer, "PNG")
    buffer.seek(0)
    assert read_settings(Image.open(buffer)) == SETTINGS


def test_formats_without_a_place_for_text_still_save(tmp_path: Path) -> None:
    write_settings(image(), SETTINGS).save(tmp_path / "x.bmp")
    with pytest.raises(ValueError, match="carries no settings"):
        read_settings(tmp_path / "x.bmp")


def test_a_callers_own_pnginfo_wins(tmp_path: Path) -> None:
    own = PngInfo()
    own.add_text("author", "me")
    write_settings(image(), SETTINGS).save(tmp_path / "x.png", pnginfo=own)
    with pytest.raises(ValueError, match="carries no settings"):
        read_settings(tmp_path / "x.png")


def test_pickle_keeps_settings_and_edits_are_plain() -> None:
    picture = pickle.loads(pickle.dumps(write_settings(image(), SETTINGS)))
    assert isinstance(picture, Picture) and picture.settings == SETTINGS
    for edited in (picture.resize((4, 4)), picture.crop((0, 0, 4, 4)), picture.copy(), picture.convert("L")):
        assert not isinstance(edited, Picture) and read_settings(edited) == SETTINGS
        for format in ("PNG", "JPEG", "WEBP"):
            edited.save(buffer := io.BytesIO(), format)
            with pytest.raises(ValueError, match="carries no settings"):
                read_settings(Image.open(buffer))


def test_errors(tmp_path: Path) -> None:
    image().save(tmp_path / "plain.png")
    (tmp_path / "words.png").write_text("no picture")
    broken, number = PngInfo(), PngInfo()
    broken.add_itxt(KEY, "{oops")
    number.add_itxt(KEY, "3")
    image().save(tmp_path / "broken.png", pnginfo=broken)
    image().save(tmp_path / "number.png", pnginfo=number)
    cases = {
        "plain": "carries no settings",
        "words": "not an image",
        "gone": "no file",
        "broken": "damaged",
        "number": "JSON object",
    }
    for name, words in cases.items():
        with pytest.raises(ValueError, match=words):
            read_settings(tmp_path / f"{name}.png")
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="plain numbers"):
            write_settings(image(), bad)


def test_python_of_settings_names_all_that_a_drawing_may_write() -> None:
    assert set(ARGUMENTS) <= set(inspect.signature(VARControlPipeline.__call__).parameters)
    numbers = {"guidance_scale": 2.0, "control_guidance_scale": 2.0, "temperature": 0.9, "top_k": 3, "top_p": 0.9}
    pipe = tiny_pipeline("canny")
    drawn = pipe(
        PROMPT, seed=3, control={"canny": edges()}, negative_prompt="a ball", stop_after=2, cache=FullCache(), **numbers
    )
    code = python_of(drawn.settings[0])
    assert "does not know" not in code
    for name in ("seed", "negative_prompt", "height", "width", "stop_after", "control", *numbers):
        assert f"    {name}=" in code


HOSTILE = "x'\nimport os\nos.system('id')\u2028#"


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "a cube", f"seed=1)\n{HOSTILE}": 1},
        {"prompt": "a cube", "cache": HOSTILE, "forced": HOSTILE, "seed": HOSTILE},
        {"prompt": HOSTILE, "model": HOSTILE, "dtype": HOSTILE, "quantize": HOSTILE},
        {"loras": [{"name": HOSTILE, "source": HOSTILE, "weight": HOSTILE}]},
        {"prompt": "a cube", "control": [{"kind": HOSTILE, "scale": HOSTILE, f"end=1){HOSTILE}": 1}]},
    ],
)
def test_python_of_settings_of_a_stranger_is_that_call_and_nothing_else(settings: dict[str, Any]) -> None:
    code = python_of(settings)
    lines = [ast.unparse(node).split("(")[0].split("\n")[0] for node in ast.parse(code).body]
    wanted = [
        "from scaleweaver import " + ("Control, VARControlPipeline" if "control" in settings else "VARControlPipeline"),
        "pipe = VARControlPipeline.from_pretrained",
        *(["pipe.quantize"] if "quantize" in settings else []),
        *(["pipe.load_lora_weights", "pipe.set_adapters"] if "loras" in settings else []),
        "out = pipe",
    ]
    assert lines == wanted and "\u2028" not in code
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert all(isinstance(word.value, ast.Constant | ast.List) for call in calls for word in call.keywords)


def test_python_of_what_are_no_settings_is_refused() -> None:
    for bad in ({"control": [3]}, {"control": [{"scale": 1}]}, {"loras": 1}, {"loras": [{"name": []}]}):
        with pytest.raises(ValueError, match="not those of a drawing"):
            python_of(bad)
