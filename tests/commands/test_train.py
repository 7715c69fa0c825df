"""`scaleweaver train`: a settings file alone, or a recipe's name with --config and one's own photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_photos import save_photo_model, write_photos
from tiny_runs import TINY, written
from typer.testing import CliRunner

from scaleweaver.cli import app
from scaleweaver.commands.train import read_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A settings file without data and model, photos, and a model."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    save_photo_model(folder / "model")
    write_photos(folder / "photos", [(64, 64)] * 4)
    values = TINY | {"recipe": "control", "kind": "canny", "out": "nowhere", "model": "nothing", "steps": 1}
    written(folder, values | {"architecture": "125M", "held_out": 0.25, "adapter": {"lora_rank": 2}, "val_pictures": 0})
    return folder


def call(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.stdout + result.stderr


def test_a_control_from_ones_own_photos(folder):
    given = ("--config", folder / "recipe.yaml", "--data", folder / "photos", "--model", folder / "model")
    code, said = call("control", *given, "--out", folder / "run", "--set", "adapter.lora_rank=3")
    assert code == 0, said
    assert f"{folder / 'run' / 'result'}\n" in said
    saved = json.loads((folder / "run/result/canny/control_config.json").read_text())
    assert saved["config"]["lora_rank"] == 3 and saved["config"]["detector"] == "opencv-canny"
    used = json.loads((folder / "run/config.json").read_text())["options"]
    assert used["data"] == {"photos": str(folder / "photos")} and used["model"] == str(folder / "model")
    code, said = call(folder / "recipe.yaml", "--data", folder / "photos", "-m", folder / "model", "-o", folder / "run")
    assert code == 1 and "holds other weights than this run trains" in said  # the same run, another rank


def test_memory_is_printed_without_training(folder):
    code, said = call("control", "--config", folder / "recipe.yaml", "--data", folder / "photos", "--estimate")
    assert code == 0, said
    assert "peak of training" in said and "batch 2, up to" in said and not Path("nowhere").exists()
    code, shared = call(folder / "recipe.yaml", "--estimate", "--processes", 2, "-m", folder / "model")
    assert code == 0 and "batch 2, 2 processes" in shared and shared != said


def test_what_does_not_fit_is_said_in_one_line(folder, tmp_path):
    recipe = folder / "recipe.yaml"
    for arguments, message in (
        (("control",), "the recipe control needs its settings; pass --config FILE"),
        ((recipe, "--config", recipe), "are both settings files; pass one of them"),
        (("backbone", "--config", recipe), "holds settings of the recipe control, not of backbone"),
        ((tmp_path / "none.yaml",), "no training config at"),
        ((recipe, "--set", "steps"), "is not KEY=VALUE"),
        ((recipe, "--data", tmp_path / "none", "-m", folder / "model", "-o", tmp_path), "there is no folder"),
    ):
        code, said = call(*arguments)
        assert code == 1 and message in said and "Traceback" not in said, said


def test_values_are_read_as_in_a_settings_file():
    read = read_settings(
        ["lr=1e-3", "ratios=[1.0, 1.5]", "map_cache=maps", "adapter.z_position=after_gate", "minutes="]
    )
    assert read == {
        "lr": "1e-3", "ratios": [1.0, 1.5], "map_cache": "maps", "adapter.z_position": "after_gate", "minutes": None,
    }  # fmt: skip
