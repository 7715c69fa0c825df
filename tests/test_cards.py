"""Model cards: what they say comes from the folder, from people or from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from tiny_pipeline import PROMPT, edges, tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.adapters import save_control
from scaleweaver.card_files import Document, is_hub_id
from scaleweaver.cards import Card, write_card
from scaleweaver.cli import app
from scaleweaver.hub import push_folder
from scaleweaver.metadata import read_settings

SHEET = b"a sheet of samples"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pipeline of 32 px with one control."""
    tiny_pipeline("canny").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """What `scaleweaver evaluate` leaves, in its form."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    column = {"name": "f1", "title": "F1", "higher": True, "digits": 3, "note": ""}
    results = {
        "settings": {"task": "control", "control": "canny", "data": "toybox", "split": "test", "count": 7},
        "columns": [column, {**column, "name": "f1_stacked"}],
        "main": "f1",
        "rows": {"strength 1": {"pictures": 7, "f1": 0.25049}, "no control": {"pictures": 7, "f1": 0.1}},
        "machine": {"gpu": "none", "processor": "a processor", "versions": {"scaleweaver": "9.9"}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "results.md").write_text("Control fidelity: canny\n\n| | F1 |\n|---|---|\n| strength 1 | 0.250 |\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a training run leaves, with its control in `result`."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    options = {"data": {"photos": "/home/somebody/photos"}, "model": "you/model"}
    config = {"recipe": "control", "steps": 20, "batch": 4, "lr": 1e-3, "seed": 5, "options": options}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text("step,name,value\n10,loss,0.7\n10,val_gain_canny,0.1\n20,val_gain_canny,0.25\n")
    for name in ("000010-canny.png", "000020-canny.png"):
        (folder / "samples" / name).write_bytes(SHEET)
    pipe = tiny_pipeline("canny")
    save_control(folder / "result" / "canny", pipe.transformer, pipe.controls["canny"], "canny", base="you/model")
    return folder


def test_a_pipeline(saved: Path, evaluation: Path, tmp_path: Path) -> None:
    drawn: Any = tiny_pipeline()(PROMPT, seed=4)
    drawn = drawn.images[0]
    file = tmp_path / "drawn.png"
    drawn.save(file)
    card = Card(
        summary="Draws cubes.",
        license="mit",
        licenses={"text_encoder": "apache-2.0"},
        datasets=["you/cubes"],
        language="en",
        tags=["cubes"],
        pictures=[drawn, file, Image.open(file), drawn.copy(), ("two words", edges())],
        measured=[evaluation],
        limits="Draws nothing but cubes.",
    )
    write_card(saved, card, name="you/cubes")
    read = ModelCard.load(saved / "README.md")
    data = read.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("scaleweaver", "text-to-image", "mit")
    assert {"visual-autoregressive", "controlnet", "canny", "cubes"} <= set(data["tags"])
    assert (data["datasets"], data["language"]) == (["you/cubes"], "en") and "base_model" not in data
    assert [(each["text"], each["output"]["url"]) for each in data["widget"]] == [
        (PROMPT, "images/000.png"),
        (PROMPT, "images/001.png"),
        (PROMPT, "images/002.png"),
        (PROMPT, "images/003.png"),
        ("two words", "images/004.png"),
    ]
    for name in ("000", "001", "002"):
        assert read_settings(saved / f"images/{name}.png") == drawn.settings
        assert Image.open(saved / f"images/{name}.png").tobytes() == drawn.tobytes()
    for name in ("003", "004"):  # a copy is no longer what the settings would make
        with pytest.raises(ValueError, match="carries no settings"):
            read_settings(saved / f"images/{name}.png")
    # the first row alone, and no metric that was not measured
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("f1", 0.25, "test")
    for words in ("Draws cubes.", "32x32 px", "| strength 1 | 0.250 |", "7 prompts of toybox test", "on a processor"):
        assert words in read.text
    assert "| text_encoder | apache-2.0 |" in read.text and "Draws nothing but cubes." in read.text


def test_what_nobody_said_is_not_made_up(saved: Path) -> None:
    read = ModelCard.load(saved / "README.md")
    data = read.data.to_dict()
    assert not {"license", "model-index", "widget", "base_model", "datasets"} & set(data)
    assert "Not stated by who uploaded it" in read.text and "## Measured" not in read.text
    numbers = sum(p.numel() for p in tiny_pipeline().vae.parameters()) / 1e6
    assert f"| `vae` | BSQTokenizer | {numbers:.2f} M | F32 |" in read.text


def test_a_control_of_a_run(run: Path) -> None:
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_test")
        said = CliRunner().invoke(app, ["push", str(run / "result/canny"), "you/canny", "--license", "mit"])
        assert said.exit_code == 0 and said.output.strip().endswith(hub.repos["you/canny"][-1].sha), said.output
        files = hub.repos["you/canny"][-1].files
        before = (run / "result/canny/README.md").read_bytes()
        assert before != files["README.md"] and not (run / "result/canny/images").exists()  # the folder stays as it is
        push_folder(run / "result/canny", "you/kept")
        assert hub.repos["you/kept"][-1].files["README.md"] == before
        (run / "result/canny/README.md").unlink()
        push_folder(run / "result/canny", "you/bare")
        assert b"| gain_canny | 0.25 | 20 |" in hub.repos["you/bare"][-1].files["README.md"]
    read = ModelCard(files["README.md"].decode())
    assert (read.data.get("base_model"), read.data.get("base_model_relation")) == ("you/model", "adapter")
    assert files["images/000020-canny.png"] == SHEET and "images/000010-canny.png" not in files
    assert "| gain_canny | 0.25 | 20 |" in read.text and "| lr | 0.001 |" in read.text
    assert "somebody" not in read.text  # where photos lie is nobody's business
    assert 'from_pretrained("you/model")\npipe.load_control("you/canny", name="canny", replace=True)' in read.text


def test_a_folder_that_a_control_was_trained_on_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the training ran, nor from elsewhere, where "runs/base" looks like one."""
    pipe = tiny_pipeline("canny")
    (tmp_path / "runs/base").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"recipe": "control", "options": {"model": "runs/base"}}))
    monkeypatch.chdir(tmp_path)
    save_control("run/result/canny", pipe.transformer, pipe.controls["canny"], "canny", base="runs/base")
    monkeypatch.chdir(tmp_path / "run")
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        push_folder("result/canny", "you/canny", card=Card(license="mit"))
        read = ModelCard(hub.repos["you/canny"][-1].files["README.md"].decode())
    assert "base_model" not in read.data.to_dict() and "those of `base`, and no others" in read.text


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("you/model-1.5_b")
    for name in ("toybox", "runs/base", "../mine", "./mine", ".cache/mine", "mine/..", "a/b/c", "C:\\mine", ""):
        assert not is_hub_id(name), name


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (Card(measured=["nowhere"]), "lacks results.json or results.md"),
        (Card(run="nowhere"), "holds no config.json; pass the folder that scaleweaver train wrote"),
        (Card(pictures=["nowhere.png"]), "picture 0 of the card"),
    ],
)
def test_errors(saved: Path, card: Card, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_card(saved, card, name="tiny")
    with pytest.raises(ValueError, match="holds neither"):
        write_card(saved / "vae", Card(), name="tiny")


def test_a_card_is_read_with_what_it_shows_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    secret = tmp_path / "secret.txt"
    (folder / "..\\secret.txt").write_text("above the folder on Windows")
    shown: dict[str, Any] = {"a.png": b"a", "deep/b.jpg": b"b", "widget.webp": b"w", "list.txt": b"l"}
    for name, data in {**shown, "run.py": b"code", "unseen.png": b"u", "weights.safetensors": b"x"}.items():
        (folder / name).write_bytes(data)
    secret.write_text("secret")
    text = (
        "---\nwidget:\n- text: x\n  output:\n    url: widget.webp\n---\n\n# Name\n\n![a](a.png) [b](deep/b.jpg)"
        f" [c](run.py) [d](weights.safetensors) [e](../secret.txt) [f]({secret}) [g](list.txt) [h](missing.png)"
        " [e](..\\secret.txt) [i](https://example.org/a.png)\n"
    )
    (folder / "README.md").write_text(text)
    found = Document.read(folder)
    assert found is not None and found.text == text and found.files == shown
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes(b"mine")
    found.write(tmp_path / "other")
    assert (tmp_path / "other/a.png").read_bytes() == b"mine" and (tmp_path / "other/deep/b.jpg").read_bytes() == b"b"
    assert Document.read(tmp_path) is None


def test_a_card_without_a_title_or_front_matter_stays_as_it_is() -> None:
    for text in ("words alone", "---\n: [broken\n---\nwords"):
        assert Document(text, {}).renamed("you/new").text == text
