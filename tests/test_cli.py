"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from tiny_pipeline import add_tiny_control, tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.controls import Canny, canny
from scaleweaver.images import fit
from scaleweaver.metadata import python_of, read_settings, write_settings
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.precision import auto_dtype

SETTINGS = {
    "model": "toybox",
    "prompt": 'a "red" cube\non grass',
    "seed": 7,
    "temperature": 0.9,
    "negative_prompt": None,
}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[:48, :64]
    disc = ((rows - 24) ** 2 + (columns - 32) ** 2 < 200)[..., None]
    path = tmp_path / "photo.png"
    Image.fromarray(np.where(disc, [250, 40, 30], [20, 90, 200]).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["generate"],
        ["preprocess"],
        ["inspect"],
        ["render"],
        ["train"],
        ["convert"],
        ["convert", "infinity"],
        ["serve"],
        ["doctor"],
    ],
)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_version() -> None:
    assert call("--version").output.startswith("scaleweaver 0.")


def test_preprocess_writes_the_map_that_python_makes(photo: Path, tmp_path: Path) -> None:
    result = call("preprocess", "canny", photo, tmp_path / "new" / "edges.png", "--low", 30, "--high", 90)
    assert result.exit_code == 0, result.output
    made = np.asarray(Image.open(tmp_path / "new" / "edges.png"))
    assert np.array_equal(made, np.asarray(canny(photo, low=30, high=90)))
    assert (made == 255).any()


def test_preprocess_refuses_in_one_line(photo: Path, tmp_path: Path) -> None:
    assert "no preprocessor makes 'sketch' maps" in refused(call("preprocess", "sketch", photo, tmp_path / "x.png"))
    assert "there is no file" in refused(call("preprocess", "canny", tmp_path / "none.png", tmp_path / "x.png"))
    assert "above high" in refused(call("preprocess", "canny", photo, tmp_path / "x.png", "--low", 300))
    assert not (tmp_path / "x.png").exists()


def test_inspect_shows_what_a_picture_carries(tmp_path: Path) -> None:
    write_settings(Image.new("RGB", (8, 8)), SETTINGS).save(tmp_path / "drawn.png")
    assert json.loads(call("inspect", tmp_path / "drawn.png", "--json").output) == SETTINGS
    shown = call("inspect", tmp_path / "drawn.png")
    assert shown.exit_code == 0
    assert "temperature" in shown.output
    assert python_of(SETTINGS) in shown.output


def test_inspect_refuses_a_picture_without_settings(photo: Path) -> None:
    assert "carries no settings" in refused(call("inspect", photo))


def test_python_of_settings_is_a_call_with_the_same_settings() -> None:
    (assignment,) = [
        node for node in ast.parse(python_of(SETTINGS)).body if ast.unparse(node).startswith("out = pipe(")
    ]
    assert isinstance(assignment, ast.Assign) and isinstance(assignment.value, ast.Call)
    (prompt,) = assignment.value.args
    assert ast.literal_eval(prompt) == SETTINGS["prompt"]
    passed = {word.arg: ast.literal_eval(word.value) for word in assignment.value.keywords}
    assert passed == {name: SETTINGS[name] for name in ("seed", "temperature", "negative_prompt")}


def test_python_of_settings_says_what_it_cannot_write() -> None:
    parts = {"cache": "Full()", "router": "SingleModel", "sampler": "Mine(3)", "search": "Best", "forced": 2}
    code = python_of({"model": "toybox", "seed": 7, "guidance_layer": -5, **parts})
    (call_node,) = [node.value for node in ast.parse(code).body if isinstance(node, ast.Assign)][1:]
    assert isinstance(call_node, ast.Call) and not call_node.args
    assert {word.arg: ast.literal_eval(word.value) for word in call_node.keywords} == {"seed": 7, "guidance_layer": -5}
    comments = [line for line in code.splitlines() if line.startswith("# drawn")]
    assert [f"# drawn with {name}={parts[name]!r}" for name in ("cache", "router", "sampler", "search")] == comments[:4]
    assert "2 scales of given codes" in comments[4] and "prompt_embeds" in comments[5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline whose control was trained on canny maps of thresholds 30 and 90 at 32 pixels."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    add_tiny_control(pipe, "canny", detector="canny", thresholds=(30.0, 90.0), resolution=32)
    pipe.save_pretrained(folder)
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def draw_again(picture: Path, *, control: Image.Image | None = None) -> np.ndarray:
    """What the Python that `inspect` prints draws, with the control image put in by hand."""
    code = python_of(read_settings(picture))
    assert ("Control('canny', 'canny.png'" in code) == (control is not None)
    names: dict[str, Any] = {"edges": control}
    exec(code.replace("'canny.png'", "edges"), names)
    return np.asarray(names["out"].images[0])


def test_generate_draws_what_the_settings_draw_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.png"
    result = call(
        "generate", "a red cube", "-m", model, "--seed", 7, "--temperature", 0.8, "--out", out, "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == str(out)
    assert " s, after " in result.stdout
    settings = read_settings(out)
    assert (settings["prompt"], settings["seed"], settings["temperature"]) == ("a red cube", 7, 0.8)
    assert np.array_equal(draw_again(out), pixels(out))


def test_generate_with_guidance_inside_a_layer(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    common = ["generate", "a red cube", "-m", model, "--seed", 7, "--device", "cpu", "--dtype", "float32"]
    result = call(*common, "--out", out, "--guidance-layer", -2)
    assert result.exit_code == 0, result.output
    assert read_settings(out)["guidance_layer"] == -2
    assert np.array_equal(draw_again(out), pixels(out))
    assert "guidance_layer is 9; this model has" in refused(call(*common, "--guidance-layer", 9))


def test_generate_under_a_photo_makes_the_map_as_training_did(model: Path, photo: Path, tmp_path: Path) -> None:
    image = Image.open(photo)
    edges = Canny(30, 90)(image.resize((43, 32), Image.Resampling.LANCZOS))
    fit(edges, 32, 32).save(tmp_path / "ready.png")
    common = ["generate", "a red cube", "-m", model, "--seed", 7, "--dtype", "float32", "--out"]
    free, ready, made = (tmp_path / name for name in ("free.png", "map.png", "photo.png.png"))
    assert call(*common, free).exit_code == 0
    assert call(*common, ready, "--control", f"canny={tmp_path / 'ready.png'}", "--control-scale", 0.7).exit_code == 0
    assert call(*common, made, "--control", f"canny={photo}", "--control-scale", 0.7, "--preprocess").exit_code == 0
    assert np.array_equal(pixels(ready), pixels(made))
    assert not np.array_equal(pixels(ready), pixels(free))
    assert read_settings(made)["control"][0]["scale"] == 0.7
    assert np.array_equal(draw_again(made, control=edges), pixels(made))
    strong = tmp_path / "strong.png"
    options = ["--control", f"canny={tmp_path / 'ready.png'}", "--control-guidance-scale", 2]
    assert call(*common, strong, *options).exit_code == 0
    assert read_settings(strong)["control_guidance_scale"] == 2
    assert np.array_equal(draw_again(strong, control=edges), pixels(strong))


def test_generate_under_controls_in_their_windows(model: Path, photo: Path, tmp_path: Path) -> None:
    edges = fit(Canny(30, 90)(photo), 32, 32)
    edges.save(tmp_path / "e.png")
    common = ["generate", "a red cube", "-m", model, "--seed", 7, "--dtype", "float32", "--out"]
    given = ["--control", f"canny={tmp_path / 'e.png'}"]
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (["--control-start", 0.25, "--control-end", 0.75], {"start": 0.25, "end": 0.75}),
        (["--control-scales", "1:3"], {"scales": [1, 2]}),
        (["--control-scales", "3,0", "--control-scale", 0.5], {"scales": [0, 3], "scale": 0.5}),
        (["--control-scales", "-2:"], {"scales": [2, 3]}),
    ]
    drawn = []
    for row, (options, kept) in enumerate(cases):
        out = tmp_path / f"{row}.png"
        result = call(*common, out, *given, *options)
        assert result.exit_code == 0, result.output
        entry = read_settings(out)["control"][0]
        assert {name: entry[name] for name in kept} == kept
        assert np.array_equal(draw_again(out, control=edges), pixels(out))
        drawn.append(pixels(out))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])


def test_generate_names_several_pictures_by_prompt_and_seed(model: Path, tmp_path: Path) -> None:
    result = call("generate", "A red cube!", "grass", "-n", 2, "-m", model, "--seed", 3, "--out", tmp_path / "many")
    assert result.exit_code == 0, result.output
    names = ["a-red-cube-3.png", "a-red-cube-4.png", "grass-5.png", "grass-6.png"]
    assert result.stdout.splitlines()[:-1] == [str(tmp_path / "many" / name) for name in names]
    assert read_settings(tmp_path / "many" / "grass-5.png")["prompt"] == "grass"


def test_generate_writes_previews_of_every_scale(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    result = call("generate", "grass", "-m", model, "--seed", 3, "--out", out, "--previews")
    assert result.exit_code == 0, result.output
    scales = len(VARControlPipeline.from_pretrained(model).config.schedule["grids"])
    strip = pixels(tmp_path / "a-scales.png")
    assert strip.shape == (32, 32 * scales, 3)
    assert np.array_equal(strip[:, -32:], pixels(out))  # after the last scale the preview is the picture
    assert not np.array_equal(strip[:, :32], strip[:, -32:])


def test_generate_shows_refusals_of_the_library_in_one_line(model: Path, photo: Path, tmp_path: Path) -> None:
    assert '"depth" is not loaded; there is canny' in refused(
        call("generate", "x", "-m", model, "-c", f"depth={photo}")
    )
    assert "model_index.json" in refused(call("generate", "x", "-m", tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "canny"], "is not KIND=PATH"),
        (["--control", "canny="], "is not KIND=PATH"),
        (["--control", "canny=missing.png"], "there is no file 'missing.png'"),
        (["--control-scale", "1", "--control-scale", "2"], "2 times --control-scale for 0 times --control"),
        (["--control-end", "1"], "1 times --control-end for 0 times --control"),
        (["--control-scales", "2-5"], "--control-scales '2-5' is neither FIRST:END"),
        (["--control-scales", "1:2:3"], "is neither FIRST:END"),
    ],
)
def test_generate_checks_controls_before_it_loads_anything(options: list[str], message: str) -> None:
    assert message in refused(call("generate", "a red cube", *options))


@pytest.mark.parametrize(
    "options",
    [
        ["--num-images", "0"],
        ["--top-p", "1.5"],
        ["--dtype", "int8"],
        ["--threads", "0"],
        ["--quantize", "int4"],
        ["--seed", "x"],
    ],
)
def test_generate_refuses_values_out_of_range(options: list[str]) -> None:
    result = call("generate", "a red cube", *options)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_render_writes_pictures_and_goes_on(tmp_path: Path) -> None:
    command = ["render", "toybox", "--split", "test", "--size", 32, "--out", tmp_path / "world"]
    first = call(*command, "--count", 1)
    assert first.exit_code == 0, first.output
    assert "1 pictures, 1 rendered now" in first.output
    assert "2 pictures, 1 rendered now" in call(*command, "--count", 2).output
    assert len({file.read_bytes() for file in (tmp_path / "world").rglob("*.png")}) >= 2


def test_training_that_diverges_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the loss is nan at step 3; lower lr")

    monkeypatch.setattr("scaleweaver.train.run", diverge)
    (tmp_path / "recipe.yaml").write_text("{recipe: judge, out: run, steps: 1, batch: 1, lr: 1}")
    assert "the loss is nan at step 3" in refused(call("train", tmp_path / "recipe.yaml"))


def test_render_and_train_refuse_what_does_not_exist(tmp_path: Path) -> None:
    assert "no world 'moon'" in refused(call("render", "moon", "--out", tmp_path))
    assert "is not KEY=VALUE" in refused(call("train", tmp_path / "none.yaml", "--set", "steps"))
    assert "none.yaml" in refused(call("train", tmp_path / "none.yaml", "--set", "steps=3"))


def test_convert_refuses_in_one_line(tmp_path: Path) -> None:
    files = ["--transformer", tmp_path / "none.pth", "--vae", tmp_path / "none.pth"]
    assert "none.pth" in refused(call("convert", "infinity", tmp_path / "out", *files))
    assert "budget '9M' is unknown" in refused(call("convert", "infinity", tmp_path / "out", *files, "--budget", "9M"))
    assert not (tmp_path / "out").exists()


def test_doctor_reports_every_part() -> None:
    result = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.output)}
    assert {"python", "torch", "threads", "int8", "device", "dtype", "kernels", "diffusers", "demo", "toybox"} <= set(
        findings
    )
    assert findings["python"]["status"] == findings["torch"]["status"] == "ok"
    assert "the torch formulas" in findings["kernels"]["found"]
    assert (
        f"auto means {str(auto_dtype(findings['device']['found'].split(':')[0].split(',')[0]))[6:]} on"
        in (findings["dtype"]["found"])
    )
    assert all("scaleweaver" not in finding["fix"] for finding in findings.values())  # it is on no package index
    assert all(finding["fix"] for finding in findings.values() if finding["status"] != "ok")
    assert result.exit_code == any(finding["status"] == "problem" for finding in findings.values())
