"""The CPU benchmark on a tiny model: every way runs, the report is complete, the tables say what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import cpu
import pytest
import torch
from cpu_tables import tables, write_into
from tiny_pipeline import tiny_pipeline

from scaleweaver.evaluate.speed import machine
from scaleweaver.pipeline import VARControlPipeline


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(dtype: torch.dtype) -> VARControlPipeline:
        pipe = tiny_pipeline("canny")
        for module in (pipe.transformer, pipe.vae):
            cpu._as(module, dtype)
        for adapter in pipe.controls.values():
            adapter.to(dtype)
        return pipe

    monkeypatch.setattr(cpu, "MODELS", {"built-in": make})
    monkeypatch.setattr(cpu, "generation_ways", lambda: [*cpu.HABITS, cpu.OURS, cpu.OURS_BF16])


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_report_and_tables(tiny: None, tmp_path: Path) -> None:
    bench = cpu.Bench(minutes=5, repeats=1)
    cpu.compare_models(bench, quick=True, threads=1)
    report = {"command": "python cpu.py", "machine": machine(), **bench.report}
    report["targets"] = cpu.targets(report)
    report = json.loads(json.dumps(report))
    generation, decoding = report["compared"]
    assert list(generation["ways"]) == [*cpu.HABITS, cpu.OURS, cpu.OURS_BF16]
    assert list(decoding["ways"]) == list(cpu.DECODES)
    assert generation["ways"][cpu.PLAIN]["times_faster"] == 1
    assert [one["controlled"] for one in report["pictures"]] == [False, False, True, True]
    reached = {one["target"]: one["reached"] for one in report["targets"]}
    assert reached["mid-size, generation, ours, bfloat16, against plain"] is None  # it was not measured
    assert reached["built-in model, controlled picture, ours, float32"] is not None

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cpu -->\nlast week\n<!-- /cpu -->\nafter\n")
    write_into(page, "cpu", tables(report))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "last week" not in text
    assert "| built-in: generation | times faster |" in text and "control encoding" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        write_into(page, "cpu", "x")


def test_targets() -> None:
    report = {
        "compared": [
            {"model": "mid-size", "what": "generation", "ways": {
                cpu.OURS: {"times_faster": 2.4}, cpu.OURS_BF16: {"times_faster": 2.5},
            }},
        ],
        "pictures": [
            {"model": model, "controlled": controlled, "way": way, "stages": {"total": {"median": seconds}}}
            for model, controlled, way, seconds in (
                ("built-in", True, cpu.OURS, 1.2), ("built-in", True, cpu.OURS_BF16, 0.9),
                ("built-in", False, cpu.OURS, 0.1), ("125M", True, cpu.OURS, 0.1),
            )
        ],
        "cold_generate": {"median": 5.9},
    }  # fmt: skip
    assert [(one["target"], one["measured"], one["reached"]) for one in cpu.targets(report)] == [
        ("mid-size, generation, ours, float32, against plain", 2.4, False),
        ("mid-size, generation, ours, bfloat16, against plain", 2.5, True),
        ("mid-size, decoding, ours, float32, against plain", None, None),
        ("mid-size, decoding, ours, bfloat16, against plain", None, None),
        ("built-in model, controlled picture, ours, float32", 1.2, False),
        ("built-in model, controlled picture, ours, bfloat16", 0.9, True),
        ("cold scaleweaver generate, controlled", 5.9, True),
    ]


def test_what_does_not_fit_is_named(tiny: None) -> None:
    bench = cpu.Bench(minutes=0, repeats=1)
    cpu.compare_models(bench, quick=True, threads=1)
    assert bench.report["compared"] == [] and "built-in: generation" in bench.report["skipped"]


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("way", [cpu.PLAIN, cpu.OURS_BF16])
def test_memory_of_one_way(tiny: None, way: str) -> None:
    found = cpu.one_process("built-in", way)
    assert 0 < found["imports_bytes"] <= found["loaded_bytes"] <= found["peak_bytes"]
