"""The page's tabs, its endpoints as a program uses them, and its form as a Space."""

from __future__ import annotations

import io
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gradio
import gradio_client
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.demo import tabs
from scaleweaver.demo.encoded import data_url, to_bytes
from scaleweaver.demo.page import build
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


def _control(entry: dict[str, Any]) -> Any:
    from scaleweaver.contracts import Control

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
    ],
)
def test_refusals_say_what_to_do(client: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(Exception, match=f"(?i){words}"):
        client.predict(*arguments, api_name="/generate")


def test_two_programs_at_once_get_their_own(address: str, client: Any) -> None:
    other = gradio_client.Client(address, verbose=False)
    jobs = [
        each.submit(f"a {color} cube on grass", [], seed, api_name="/generate")
        for each, color, seed in ((client, "red", 1), (other, "blue", 2), (client, "green", 3))
    ]
    ends = [job.outputs()[-1] if job.result() else None for job in jobs]
    assert [end["settings"][0]["prompt"].split()[1] for end in ends] == ["red", "blue", "green"]
    assert [end["seeds"] for end in ends] == [[1], [2], [3]]


def test_the_folder_is_a_space() -> None:
    _, front, _ = (DEMO / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line[:60])
    assert card["sdk"] == "gradio" and card["sdk_version"] == pins["gradio"] == gradio.__version__
    assert (DEMO / card["app_file"]).is_file() and card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60 and card["colorFrom"] and card["colorTo"] and card["title"]
    lines = (DEMO / "requirements.txt").read_text().splitlines()
    (wanted,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert wanted.name == "scaleweaver" and wanted.extras == {"demo"}
    names = runpy.run_path(str(DEMO / card["app_file"]), run_name="space")
    assert callable(names["launch"]) and names["MODEL"] == "toybox"


def test_files_of_the_folder_hide_no_module_of_python() -> None:
    # a Space runs app.py as a script, so that its neighbours are importable by their bare names
    names = {path.stem for path in DEMO.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_the_command_explains_itself() -> None:
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0 and "--port" in result.output
