"""The page's tabs, its endpoints as a program uses them, and its form as a Space."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gradio
import gradio_client
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.contracts import Control
from scaleweaver.demo import tabs
from scaleweaver.demo.encoded import data_url, to_bytes
from scaleweaver.demo.make_space import make_space
from scaleweaver.demo.page import build
from scaleweaver.demo.studio import Studio
from scaleweaver.demo.tabs import compare
from scaleweaver.metadata import read_settings

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demo"
TAB = """
import gradio as gr
TITLE, ORDER = "Edit", 15
def build(studio):
    gr.Markdown("a tab of one's own", elem_id="edit")
"""


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(to_bytes(url, "picture")))


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return gradio_client.Client(address, verbose=False)


def test_a_file_in_the_folder_is_a_tab(studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tab.title for tab in tabs.find_tabs()] == ["Generate", "Compare", "Inspect"]
    (tmp_path / "edit.py").write_text(TAB)
    monkeypatch.setattr(tabs, "__path__", [*tabs.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "scaleweaver.demo.tabs.edit", raising=False)
    assert [tab.title for tab in tabs.find_tabs()] == ["Generate", "Edit", "Compare", "Inspect"]
    page = build(studio)
    assert any(getattr(block, "elem_id", None) == "edit" for block in page.blocks.values())
    sys.modules.pop("scaleweaver.demo.tabs.edit")


def test_the_page_waits_in_one_line_and_shares_nothing(studio: Any) -> None:
    page = build(studio)
    assert page._queue.max_size == studio.limits.waiting
    functions = list(page.fns.values())
    drawing = [function for function in functions if function.concurrency_id == "model"]
    assert len(drawing) == 4 and all(function.concurrency_limit == 1 for function in drawing)
    visible = Counter(function.api_visibility for function in functions)
    assert visible["public"] == 4 and set(visible) == {"public", "private"}


def test_endpoints_have_names(client: Any) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/generate", "/map", "/scene", "/settings"}


def test_a_program_draws_and_sees_every_scale(client: Any, toybox: Any) -> None:
    scene = client.predict(3, "depth", api_name="/scene")
    control = {"kind": "depth", "image_b64": scene["maps"]["depth"], "scale": 0.8, "end": 0.9}
    job = client.submit("a red mushroom on stone at dawn", [control], 5, 2, api_name="/generate")
    *_, last = job.outputs() if job.result() else []
    streamed = [output["scale"] for output in job.outputs()[:-1]]
    assert streamed == [1, 2, 3, 4, 5, 6]
    assert last["seeds"] == [5, 6] and last["seconds"] > 0
    picture = opened(last["pictures"][1])
    settings = read_settings(picture)
    assert settings == last["settings"][1]
    assert settings["control"][0] == {"kind": "depth", "scale": 0.8, "start": 0.0, "end": 0.9, "resize": "crop",
                                      "masked": False}  # fmt: skip
    same = toybox("a red mushroom on stone at dawn", seed=6, control=[_control(control)])
    assert np.array_equal(picture, same.images[0])
    found = client.predict(last["pictures"][1], api_name="/settings")
    assert found["settings"] == settings and "VARControlPipeline.from_pretrained('toybox')" in found["python"]


def _control(entry: dict[str, Any]) -> Control:
    return Control(entry["kind"], opened(entry["image_b64"]), scale=entry["scale"], end=entry["end"])


def test_a_program_gets_maps(client: Any, studio: Any) -> None:
    photo = Image.open(DEMO / "examples" / "rocket.png").convert("RGB")
    made = client.predict(data_url(photo), "canny", api_name="/map")
    assert np.array_equal(opened(made).convert("RGB"), studio.map_of("canny", photo))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", [], 1), "the prompt is empty"),
        (("a cube", [{"kind": "ghost", "image_b64": data_url(Image.new("RGB", (8, 8)))}], 1), "ghost"),
        (("a cube", [{"kind": "canny", "picture": "x"}], 1), "pass kind and image_b64"),
        (("a cube", [{"kind": "canny", "image_b64": "/etc/hostname"}], 1), "image of canny"),
        (("a cube", [], 1, 99), "99 pictures were asked for"),
        # not one of these pictures is looked at
        (("a cube", [{"kind": "canny", "image_b64": "*"}] * 4, 1), "4 controls were given; use at most 3"),
        (("a cube", {"kind": "canny", "image_b64": "*"}, 1), "no list of objects"),
        (("a cube", [{"kind": "canny", "image_b64": "*"}, "canny"], 1), "no list of objects"),
    ],
)
def test_refusals_say_what_to_do(client: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(Exception, match=f"(?i){words}"):
        client.predict(*arguments, api_name="/generate")


def test_a_program_may_give_masks_and_photos_of_any_size(client: Any, toybox: Any, studio: Any) -> None:
    photo = Image.open(DEMO / "examples" / "rocket.png").convert("RGB").resize((300, 200))
    mask = Image.new("L", (300, 200))
    mask.paste(255, (0, 0, 150, 200))
    entry = {"kind": "canny", "image_b64": data_url(photo), "preprocess": True, "mask_b64": data_url(mask)}
    job = client.submit("a red cube", [entry], 5, api_name="/generate")
    last = job.outputs()[-1] if job.result() else {}
    control = Control("canny", studio.map_of("canny", photo), mask=mask)
    assert np.array_equal(opened(last["pictures"][0]), toybox("a red cube", seed=5, control=control).images[0])


def test_two_programs_at_once_get_their_own(address: str, client: Any) -> None:
    other = gradio_client.Client(address, verbose=False)
    jobs = [
        each.submit(f"a {color} cube on grass", [], seed, api_name="/generate")
        for each, color, seed in ((client, "red", 1), (other, "blue", 2), (client, "green", 3))
    ]
    ends = [job.outputs()[-1] if job.result() else None for job in jobs]
    assert [end["settings"][0]["prompt"].split()[1] for end in ends] == ["red", "blue", "green"]
    assert [end["seeds"] for end in ends] == [[1], [2], [3]]


def test_a_space_is_the_page_with_all_that_it_needs(tmp_path: Path) -> None:
    space = tmp_path / "space"
    make_space(space)
    with pytest.raises(ValueError, match="is not empty"):
        make_space(space)
    _, front, _ = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])
    assert card["sdk"] == "gradio" and card["sdk_version"] == pins["gradio"] == gradio.__version__
    assert (space / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60 and card["colorFrom"] and card["colorTo"] and card["title"]
    wanted = {line.name: line for line in map(Requirement, (space / "requirements.txt").read_text().splitlines())}
    assert {"torch", "diffusers", "transformers", "psutil"} <= set(wanted) and not {"gradio", "pytest"} & set(wanted)
    for name in ("torch", "psutil", "numpy"):
        assert wanted[name].specifier.contains(version(name)) and "==" in str(wanted[name].specifier)
    assert not list(space.rglob("__pycache__"))
    # what a Space runs, with a tab that was put there: nothing of this checkout
    (space / "scaleweaver" / "demo" / "tabs" / "edit.py").write_text(TAB)
    code = (
        "import runpy; names = runpy.run_path('app.py', run_name='space')\n"
        "import scaleweaver.controls, scaleweaver.kernels\n"
        "from scaleweaver.demo.tabs import find_tabs\n"
        "from scaleweaver.hub import built_in_folder\n"
        "print(names['MODEL'], *(tab.title for tab in find_tabs()))\n"
        "parts = (scaleweaver, scaleweaver.controls, scaleweaver.kernels)\n"
        "print(*(part.__file__ for part in parts), built_in_folder('toybox'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True, check=True)
    *_, page, files = done.stdout.splitlines()
    assert page == "toybox Generate Edit Compare Inspect"
    assert (
        all(file.startswith(str(space)) for file in files.split())
        and (space / "scaleweaver" / "assets" / "toybox" / "controls").is_dir()
    )


def test_files_of_the_folder_hide_no_module_of_python() -> None:
    # where app.py runs as a script, its neighbours are importable by their bare names
    names = {path.stem for path in DEMO.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_the_command_explains_itself() -> None:
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0 and "--port" in result.output


def test_compare_leaves_the_numbers_of_the_model_alone() -> None:
    pipe = tiny_pipeline(guidance_scale=[1.0, 4.0, 2.0, 3.0], temperature=[0.5, 1.0, 1.0, 1.5])
    with gradio.Blocks() as page:
        compare.build(Studio(pipe))
    (start,) = [function for function in page.fns.values() if function.concurrency_id == "model"]
    values = [block.value for block in start.inputs]  # as the page shows them at first
    values[0] = "a red cube on grass"
    guidance = next(i for i, block in enumerate(start.inputs) if "words" in block.label)
    (a, _), *_ = last_of(start.fn(*values))
    assert np.array_equal(a, pipe("a red cube on grass", seed=7).images[0])
    values[guidance] = 6.0
    (a, b), *_ = last_of(start.fn(*values))
    assert np.array_equal(a, pipe("a red cube on grass", seed=7, guidance_scale=6.0).images[0])
    assert np.array_equal(b, pipe("a red cube on grass", seed=7).images[0])


def last_of(stream: Iterator[Any]) -> Any:
    *_, last = stream
    return last
