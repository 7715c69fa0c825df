"""`scaleweaver bench`: what it reports, and what it refuses; never how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny_pipeline import PROMPT, tiny_pipeline
from typer.testing import CliRunner

from scaleweaver.cli import app

SCALES = ["scale 1, 1x1", "scale 2, 2x2", "scale 3, 3x3", "scale 4, 4x4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    tiny_pipeline("canny", "depth").save_pretrained(folder)
    return folder


def call(model: Path, *arguments: Any, dtype: str = "float32") -> Result:
    options = ["--model", model, "--prompt", PROMPT, "--device", "cpu", "--dtype", dtype, "--repeats", 2, *arguments]
    return CliRunner().invoke(app, ["bench", *map(str, options)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_report(model: Path, dtype: str) -> None:
    result = call(model, "--json", dtype=dtype)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["dtype"] == dtype and report["picture"] == [32, 32]
    assert list(report["pictures"]) == ["without control", "under canny"]
    without, under = report["pictures"].values()
    assert list(without["stages"]) == ["text encoding", "conditions", *SCALES, "rest", "decoding", "total"]
    assert set(under["stages"]) - set(without["stages"]) == {"control encoding"}
    assert under["repeats"] == 2 and under["first_run"]["total"] > 0
    assert set(report["plain"]["times_faster"]) == {"generation", "decoding", "total"}
    assert report["plain"]["dtype"] == "float32"
    # a tiny model, of which tensors that the estimate knows are the most
    assert report["estimated_peak_bytes"] == pytest.approx(report["peak_bytes"], rel=0.25)


def test_table(model: Path) -> None:
    result = call(model, "--control", "depth", "--no-plain")
    assert result.exit_code == 0, result.output
    assert "a picture under depth:" in result.stdout and "scale 4, 4x4" in result.stdout
    assert "estimated by pipe.estimate()" in result.stdout and "plain eager" not in result.stdout


def test_without_control(model: Path) -> None:
    report = json.loads(call(model, "--control", "none", "--no-plain", "--json").stdout)
    assert list(report["pictures"]) == ["without control"]


def test_threads(model: Path) -> None:
    before = torch.get_num_threads()
    try:
        report = json.loads(call(model, "--control", "none", "--no-plain", "--json", "--threads", before + 1).stdout)
    finally:
        torch.set_num_threads(before)
    assert report["machine"]["threads"] == before + 1


def test_unknown_control(model: Path) -> None:
    result = call(model, "--control", "sepia")
    assert result.exit_code == 1
    assert "no control 'sepia'" in result.stderr and "canny, depth" in result.stderr
