"""A model put together as it ships, over one that lies there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_pipeline import tiny_pipeline

from scaleweaver.train.assembly import assemble

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "toybox" / "assemble.py"
WRITTEN = ("README.md", "controls/canny/README.md", "controls/canny/sheet.png", "images/deep/a.png")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_people_wrote_is_kept(tmp_path):
    torch.manual_seed(0)
    tiny_pipeline("canny").save_pretrained(tmp_path / "run")
    out = tmp_path / "shipped"
    assemble(out, tmp_path / "run")
    fresh = files(out)
    for name in (*WRITTEN, "controls/depth/README.md", "transformer/stray.safetensors"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"mine: {name}")
    (tmp_path / "shipped.partial").mkdir()  # of a call that was killed
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path / "run"), "--out", str(out)]
    command += ["--control-guidance-scale", "4", "--temperature", "0.5"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "MB  together" in said and "MB  transformer/" in said
    # the card of a control that is gone and all that is not written by hand go
    assert files(out) == fresh | set(WRITTEN) and [path.name for path in tmp_path.glob("shipped*")] == ["shipped"]
    assert all((out / name).read_text() == f"mine: {name}" for name in WRITTEN)
    settings = json.loads((out / "model_index.json").read_text())
    assert (settings["control_guidance_scale"], settings["temperature"]) == (4.0, 0.5)
    assert str(tmp_path) not in (out / "model_index.json").read_text()
    weights = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
