"""The curve of a training: what is kept of metrics.csv, and the figure from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import training_curve as script
from PIL import Image


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A tokenizer, whose loss is not one of bits, and a backbone with controls."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("step,name,value\n10,loss,9.5\n10,val_psnr,25\n20,loss,8\n20,val_psnr,29.5\n20,val_f1,0.5\n")
    lines = [f"{step},{name},{0.7 - step / 1000}" for step in range(1, 301) for name in ("loss", "accuracy_0")]
    lines += ["300,val_loss_without,0.41", "300,val_loss_canny,0.40", "300,val_gain_canny,0.01"]
    second.write_text("step,name,value\n" + "\n".join(lines) + "\n")
    return [f"tokenizer={first}", f"controls={second}"]


def test_the_table_is_compact_and_makes_the_figure_again(runs, tmp_path):
    table, out, document = tmp_path / "curve.csv", tmp_path / "images/curve.png", tmp_path / "card.md"
    document.write_text("<!-- curve -->\n<!-- /curve -->\n")
    script.main([*runs, "--table", str(table), "--out", str(out), "--into", str(document)])
    rows = script.read_table(table)
    assert [row for row in rows if row[0] == "tokenizer"] == [
        ("tokenizer", 10, "val_psnr", 25.0), ("tokenizer", 20, "val_psnr", 29.5),
    ]  # fmt: skip
    losses = [row for row in rows if row[2] == "loss"]
    assert len(losses) == 100 and losses[0] == ("controls", 3, "loss", pytest.approx(0.698))
    assert ("controls", 300, "val_gain_canny", 0.01) in rows
    assert "](images/curve.png)" in document.read_text()
    once = out.read_bytes()
    script.main(["--table", str(table), "--out", str(out)])
    assert out.read_bytes() == once


def test_the_figure_has_a_panel_for_what_there_is(runs):
    rows = [row for entry in runs for row in script.read_stage(*_pair(entry))]
    whole = script.figure(rows)
    part = script.figure([row for row in rows if row[0] == "tokenizer"])
    assert whole.height == 3 * part.height
    pixels = np.asarray(whole.convert("RGB")).reshape(-1, 3)
    for kind in ("training", "canny"):
        color = np.array(Image.new("RGB", (1, 1), script.COLORS[kind]))[0, 0]
        assert (pixels == color).all(axis=1).sum() > 50, kind
    with pytest.raises(ValueError, match=r"pass the metrics\.csv files"):
        script.figure([])


def test_ticks_are_round():
    assert script._ticks(0.276, 0.338) == pytest.approx([0.28, 0.29, 0.3, 0.31, 0.32, 0.33])
    assert script._ticks(24.7, 29.9) == [25, 26, 27, 28, 29]


def test_what_is_no_stage_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([f"tokenizer={tmp_path / 'none.csv'}", "--out", str(tmp_path / "x.png")])
    assert "names no file; write NAME=FOLDER/metrics.csv" in capsys.readouterr().err


def _pair(entry: str) -> tuple[str, Path]:
    name, _, path = entry.partition("=")
    return name, Path(path)
