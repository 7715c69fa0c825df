"""`scaleweaver preprocess`: the map that Python makes, for every kind, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from tiny_controls import save_depth, save_pose, save_segmentation
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.commands.preprocess import read_changes
from scaleweaver.controls import KINDS, Canny, Depth, Palette, preprocessor

NETWORKS = ("depth", "normals", "segmentation")


def call(*arguments: str | Path | float) -> Result:
    return CliRunner().invoke(app, ["preprocess", *map(str, arguments)])


def refused(*arguments: str | Path | float) -> str:
    result = call(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[:48, :64]
    disc = ((rows - 24) ** 2 + (columns - 32) ** 2 < 200)[..., None]
    path = tmp_path / "photo.png"
    Image.fromarray(np.where(disc, [250, 40, 30], [20, 90, 200]).astype(np.uint8)).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pose", "inpaint", *NETWORKS)])
def test_every_kind_without_a_network(kind: str, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / f"{kind}.png"
    result = call(kind, photo, out, "--detect-resolution", 32)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert np.array_equal(pixels(out), np.asarray(preprocessor(kind, detect_resolution=32)(photo)))


def test_networks_from_a_folder(photo: Path, tmp_path: Path) -> None:
    depth, classes = save_depth(tmp_path / "depth"), save_segmentation(tmp_path / "classes")
    for kind, folder in (("depth", depth), ("normals", depth), ("segmentation", classes)):
        out = tmp_path / f"{kind}.png"
        result = call(kind, photo, out, "--set", f"model={folder}", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert np.array_equal(pixels(out), np.asarray(preprocessor(kind, model=str(folder))(photo)))
    result = call("depth", photo, tmp_path / "deep.png", "--set", f"model={depth}", "--sixteen-bit")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(tmp_path / "deep.png"), np.asarray(Depth(str(depth)).sixteen_bit(photo)))


def test_help_names_every_kind() -> None:
    words = set(call("--help").output.replace(",", " ").replace(".", " ").split())
    assert set(KINDS) <= words


def test_settings(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    assert call("palette", photo, out, "--set", "cells=3").exit_code == 0
    assert np.array_equal(pixels(out), np.asarray(Palette(3)(photo)))
    for options in (["--low", 30, "--high", 90], ["--set", "low=30", "--set", "high=90"]):
        assert call("canny", photo, out, *options).exit_code == 0
        assert np.array_equal(pixels(out), np.asarray(Canny(30, 90)(photo)))
    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    options = ["--set", f"mask={tmp_path / 'mask.png'}", "--set", "color=[9, 8, 7]"]
    assert call("inpaint", photo, out, *options).exit_code == 0
    assert (pixels(out) == (9, 8, 7)).all()
    assert read_changes(["a=1.5", "b=[1, 2]", "c=x=y", "d=null", "e=true"]) == {
        "a": 1.5, "b": [1, 2], "c": "x=y", "d": None, "e": True,
    }  # fmt: skip


def test_poses_and_their_key_points(photo: Path, tmp_path: Path) -> None:
    network, people = save_pose(tmp_path / "networks")
    chosen = {"model": network, "detector": people, "threshold": 0, "people": 2}
    options = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    drawn, record = tmp_path / "pose.png", tmp_path / "new" / "pose.json"
    result = call("pose", photo, drawn, *options, "--json", record, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(record), str(drawn)]
    saved = json.loads(record.read_text())
    assert (saved["canvas_width"], saved["canvas_height"], len(saved["people"])) == (64, 48, 2)
    assert saved == preprocessor("pose", **chosen).to_json(photo)
    # the file draws the same again, without any network
    assert call("pose", record, tmp_path / "again.png", "--set", "threshold=0").exit_code == 0
    assert pixels(drawn).any() and np.array_equal(pixels(tmp_path / "again.png"), pixels(drawn))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sketch", "photo.png", "x.png"], "no preprocessor makes 'sketch' maps; there is canny, depth"),
        (["canny", "none.png", "x.png"], "there is no file"),
        (["canny", "photo.png", "x.png", "--low", "300"], "above high"),
        (["blur", "photo.png", "x.png", "--low", "30"], "blur does not take low; it can be given"),
        (["blur", "photo.png", "x.png", "--device", "cpu"], "blur does not take device"),
        (["blur", "photo.png", "x.png", "--set", "radius"], "--set 'radius' is not KEY=VALUE"),
        (["blur", "photo.png", "x.png", "--set", "radius=wide"], "blur radius='wide'; pass a number"),
        (["inpaint", "photo.png", "x.png"], "inpaint needs mask"),
        (["canny", "photo.png", "x.map"], "'x.map' does not end like a picture; write for example x.png"),
        (["canny", "photo.png", "x.psd"], "'x.psd' does not end like a picture"),  # one that is read alone
        (["canny", "photo.png", "x.png", "--sixteen-bit"], "--sixteen-bit writes depth as PNG"),
        (["depth", "photo.png", "x.jpg", "--sixteen-bit"], "--sixteen-bit writes depth as PNG"),
        (["depth", "photo.png", "x.png", "--json", "x.json"], "--json writes the key points of pose"),
        (["depth", "photo.png", "x.png"], 'without the Hub there is model="toybox"'),
        (["depth", "photo.png", "x.png", "--set", "model=toybox", "--device", "gpu"], "device='gpu'"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not list(tmp_path.glob("x.*"))
