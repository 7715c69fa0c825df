"""The scripts of what a call and a number format cost, end to end on tiny models."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.tokenizers.bsq import BSQTokenizer


def test_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import cost

    monkeypatch.setattr(cost, "build", partial(cost.build, depth=1, width=32, heads=2))
    schedule = cost.schedule
    monkeypatch.setattr(cost, "schedule", lambda side: schedule(side // 2))
    monkeypatch.setattr(cost, "decoder", lambda: BSQTokenizer(bits=32, widths=(8,) * 5, norm_groups=4).eval())
    cost.main(["--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "cost.json").read_text())
    assert list(report["series"]) == ["resolution", "batch", "controls", "prompt", "decode"]
    for points in report["series"].values():
        for point in points:
            assert point["seconds"] > 0 and point["flops"] > 0
            # of a model this narrow the prompt is the most, and a call holds the features that it was given once more
            assert point["estimated_bytes"] == pytest.approx(point["peak_bytes"], rel=0.15)
    assert report["fits"]["decode"]["flops"] == pytest.approx(1, abs=0.05)
    assert (tmp_path / "cost.png").stat().st_size > 1000
    text = (tmp_path / "cost.md").read_text()
    assert "| pictures at once | 1 to 2 |" in text and "| controls | 0 to 3 |" in text


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_dtypes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import dtypes

    def load(name: str) -> VARControlPipeline:
        pipe = tiny_pipeline("canny")
        return pipe if name == "float32" else pipe.to(torch.bfloat16)

    monkeypatch.setattr(dtypes, "FORMATS", {name: dtypes.FORMATS[name] for name in ("float32", "bfloat16")})
    monkeypatch.setattr(dtypes, "load", load)
    threads = str(torch.get_num_threads())
    dtypes.main(["--scenes", "2", "--rounds", "1", "--threads", threads, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "dtypes.json").read_text())
    exact, other = report["formats"]["float32"], report["formats"]["bfloat16"]
    assert exact["equal_bits"] == 1 and exact["psnr"] is None
    assert 0.5 < other["equal_bits"] < 1 and other["psnr"] > 0
    assert other["transformer_bytes"] < exact["transformer_bytes"]
    text = (tmp_path / "dtypes.md").read_text()
    assert "| float32 | 100.00% | the same |" in text and "2 scenes" in text
