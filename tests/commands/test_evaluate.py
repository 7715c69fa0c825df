"""`scaleweaver evaluate`: what it writes, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from huggingface_hub import ModelCard
from PIL import Image
from tiny_pipeline import tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cards import Card, write_card
from scaleweaver.cli import app
from scaleweaver.controls.estimator import ToyboxEstimator
from scaleweaver.evaluate.attributes import AttributeJudge
from scaleweaver.evaluate.protocols import PROTOCOLS, protocol
from scaleweaver.toybox.dataset import draw_batch

pytestmark = pytest.mark.filterwarnings("ignore:the prompt has")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with three controls, a judge, an estimator, and two pictures with captions."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_pipeline("canny", "depth", "pose").save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AttributeJudge(widths=(8, 8, 16, 16, 16)).save_pretrained(folder / "judge")
        ToyboxEstimator(widths=(8, 8, 8, 8, 8), size=32).save_pretrained(folder / "estimator")
    (folder / "photos").mkdir()
    for number, picture in enumerate(draw_batch("test", range(2), size=40).pixels):
        Image.fromarray(picture).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text("a red cube")
    return folder


def call(folder: Path, command: str, *arguments: Any) -> Result:
    options = ["--model", folder / "model", "--device", "cpu", "--dtype", "float32", "--count", 2, *arguments]
    return CliRunner().invoke(app, ["evaluate", command, *map(str, options)])


def on_a_card(folder: Path, out: Path) -> ModelCard:
    """The card of the tiny model with what was measured of it."""
    shutil.copytree(folder / "model", out / "model")
    write_card(out / "model", Card(measured=[out]), name="you/tiny")
    return ModelCard.load(out / "model/README.md")


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", [[], ["control"], ["quality"]])
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, ["evaluate", *command, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.output


@pytest.mark.parametrize(("kind", "column"), [("canny", "F1, 1 px"), ("depth", "RMSE"), ("pose", "PCK@0.1")])
def test_control(folder: Path, tmp_path: Path, kind: str, column: str) -> None:
    more = ["--kind", kind, "--scales", "1.0", "--baseline", "no-control", "--out", tmp_path]
    more += [] if kind == "canny" else ["--estimator", folder / "estimator"]
    result = call(folder, "control", *more)
    assert result.exit_code == 0, result.output
    assert f"| {column} |" in result.stdout and "| no control | 2 |" in result.stdout
    assert {"results.json", "results.md", "report.html", "settings.json"} <= {path.name for path in tmp_path.iterdir()}
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["kind"] == kind and list(found["rows"]) == ["strength 1", "no control", "true pictures"]
    card = on_a_card(folder, tmp_path)
    assert f"| {column} |" in card.text and "2 prompts of toybox test" in card.text
    first = found["rows"]["strength 1"]
    digits = {each["name"]: each["digits"] for each in found["columns"] if first.get(each["name"]) is not None}
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == {
        name: round(first[name], many) for name, many in digits.items()
    }
    again = call(folder, "control", *more, "--seed", 3)
    assert "made with other settings (seed 0 -> 3)" in refused(again)


def test_control_on_a_folder_by_a_protocol(folder: Path, tmp_path: Path) -> None:
    """The tiny model draws its own size whatever the protocol says; four pictures a prompt are drawn and stacked."""
    options = ["--kind", "canny", "--data", folder / "photos", "--protocol", "controlnet++", "--set", "low=50"]
    result = call(folder, "control", *options, "--baseline", "", "--scales", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rows"]["strength 1"]["pictures"] == 8 and "f1_stacked" in found["rows"]["strength 1"]
    assert found["settings"]["meter"] == "opencv canny 50/200" and found["settings"]["data"] == "photos"
    assert found["settings"]["call"]["negative_prompt"] == "worst quality, low quality"
    assert found["notes"][0].startswith("Protocol controlnet++: four images a prompt")


def test_quality(folder: Path, tmp_path: Path) -> None:
    result = call(folder, "quality", "--judge", folder / "judge", "--kind", "canny", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "FD-judge" in result.stdout and "| prompts and canny | 2 |" in result.stdout
    assert "<title>Picture quality</title>" in (tmp_path / "report.html").read_text()
    card = on_a_card(folder, tmp_path)
    assert "| prompts and canny | 2 |" in card.text
    assert {each.task_name for each in card.data.eval_results} == {"Text to image, quality, prompts"}


def test_refusals(folder: Path, tmp_path: Path) -> None:
    control = ["--kind", "canny", "--out", tmp_path / "new"]
    for arguments, message in (
        ([*control, "--scales", "big"], "write for example 1.0,0.5"),
        ([*control, "--baseline", "luck"], "unknown baselines luck"),
        ([*control, "--protocol", "mine"], "pass one of controlnet++, controlar"),
        ([*control, "--protocol", "controlar"], "is for photos; pass their folder as --data"),
        ([*control, "--data", tmp_path / "nowhere"], "there is no folder"),
        (["--kind", "palette", "--out", tmp_path / "new"], 'no control "palette"; there is canny, depth, pose'),
        (["--kind", "depth", "--estimator", tmp_path, "--out", tmp_path / "new"], "holds no estimator"),
    ):
        assert message in refused(call(folder, "control", *arguments))
    quality = ["--out", tmp_path / "new"]
    assert "holds no judge" in refused(call(folder, "quality", "--judge", tmp_path, *quality))
    judge = ["--judge", folder / "judge", *quality]
    assert 'no features are called "magic"' in refused(call(folder, "quality", "--features", "magic", *judge))
    assert not (tmp_path / "new").exists()


def test_protocols_say_what_they_fix() -> None:
    for name in PROTOCOLS:
        preset = protocol(name)
        assert preset.name == name and preset.size == 512 and "Theirs:" in preset.note
        assert preset.detectors["canny"] == {"low": 100, "high": 200}
