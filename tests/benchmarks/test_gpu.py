"""gpu.py without a GPU: all its parts end to end on a tiny model, what it does when something fails, its targets."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scaleweaver.kernels.measured import load

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when it is run by name: it reads its neighbours
    try:
        names = ("gpu", "gpu_setup", "gpu_kernels", "gpu_pictures", "gpu_report")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def errors(found: Any) -> list[str]:
    """All errors in a report, wherever they are."""
    if isinstance(found, dict):
        own = [found["error"]] if isinstance(found.get("error"), str) else []
        return own + [error for value in found.values() for error in errors(value)]
    return [error for value in found for error in errors(value)] if isinstance(found, list) else []


@pytest.fixture(scope="module")
def report(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    seed = torch.initial_seed()
    scripts["gpu"].main(["--device", "cpu", "--tiny", "--out", str(folder), "--keep-times", str(folder / "kept.json")])
    torch.manual_seed(seed)
    return {"folder": folder, **json.loads((folder / "gpu.json").read_text())}


def test_every_part_runs(scripts: dict[str, ModuleType], report: dict[str, Any]) -> None:
    assert set(scripts["gpu"].PARTS) <= set(report["seconds"])
    # what a CPU has no way back for, and nothing else
    assert all("FlexAttention does not support backward on CPU" in error for error in errors(report)), errors(report)
    assert report["ceilings"]["copy_gb_per_s"] > 0 and report["tests"]["passed"]
    assert len(report["checks"]) == 4
    assert all(row["ok"] and row["written"] and row["same_bits"] for row in report["checks"])
    assert {row["kernel"] for row in report["pointwise"]} >= {"qkv_rope", "gate_norm", "sample_bits"}
    assert all(found["differ"] == 0 for found in report["same_pictures"].values())
    tiles = {name: found["psnr_db"] for name, found in report["tiles"].items()}
    assert min(value for name, value in tiles.items() if name.startswith("exact")) > 100
    assert all(20 < value < 100 for name, value in tiles.items() if name.startswith("blended"))


def test_pictures_are_timed_by_stage_and_held_against_a_floor(report: dict[str, Any]) -> None:
    cases, floors = report["pictures"]["cases"], report["pictures"]["floors"]
    kinds = {(case["side"], case["batch"], case["controls"], case["encoding"]) for case in cases}
    assert {
        ("24", 1, 0, "none"),
        ("24", 1, 2, "fresh"),
        ("16", 1, 1, "reused"),
        ("24", 2, 1, "fresh"),
        ("24", 2, 2, "reused"),
    } <= kinds
    for case in cases:
        names = ["text encoder", "encoding controls", "conditions and scale 0", "scale 1"]
        assert list(case["stages_ms"])[:4] == names and list(case["stages_ms"])[-1] == "decoder"
        assert case["total_ms"] >= 0.8 * sum(case["stages_ms"].values()) > 0
    assert all(entry["total_ms"] > 0 for entry in report["pictures"]["plain"])
    by_kind = {(floor["side"], floor["batch"], floor["controls"]): floor for floor in floors}
    none, one, many = (by_kind[key] for key in (("24", 1, 0), ("24", 1, 1), ("24", 2, 0)))
    # history before the last scale: keys and values of five tokens, 64 wide, two rows, float32
    assert none["kv_bytes"] == 5 * 64 * 2 * 2 * 4 and many["kv_bytes"] == 2 * none["kv_bytes"]
    assert none["measured_kv_bytes"] == none["kv_bytes"] and "control prefill" in one["tflop"]
    assert one["floor_ms"]["fresh"] > one["floor_ms"]["reused"] >= none["floor_ms"]["reused"]
    assert many["tflop"]["linear layers"] == pytest.approx(2 * none["tflop"]["linear layers"])


def test_timings_go_into_the_dispatchers_table(report: dict[str, Any]) -> None:
    for name in ("attention_times.json", "kept.json"):
        found = load(report["folder"] / name)
        assert {(timing.rows, timing.queries, timing.keys) for timing in found} == {
            (rows, *scale) for rows in (2, 4) for scale in ((1, 1), (4, 5), (9, 14))
        }
        assert all(timing.head_width == 32 and "torch" in timing.versions for timing in found)


def test_the_page_says_what_was_reached(scripts: dict[str, ModuleType], report: dict[str, Any]) -> None:
    text = (report["folder"] / "gpu.md").read_text()
    assert "| 1024, batch 1, guidance, end to end | 245 ms | not measured | no |" in text
    assert text.count("\n## ") == 14

    def picture(controls: int, encoding: str, ms: float, mode: str = "graphs") -> dict[str, Any]:
        case = {"side": "1024", "batch": 1, "controls": controls, "encoding": encoding}
        return {**case, "mode": mode, "total_ms": ms, "stages_ms": {"decoder": 9.0}}

    made = {
        **{name: report[name] for name in ("command", "machine", "seconds")},
        "pictures": {"cases": [picture(0, "none", 240.0), picture(0, "none", 300.0, "eager"),
                               picture(1, "fresh", 310.0), picture(1, "reused", 250.0)]},
        "pointwise": [{"kernel": "a", "of_copy": 0.9}, {"kernel": "b", "of_copy": 0.71}],
        "training_attention": [
            {"mask": "block_causal", "backward": True, "way": way, "ms": ms}
            for way, ms in (("kernel", 5.0), ("flex", 4.0), ("slices", 6.0), ("masked", 1.0))
        ],
        "memory": {"everything on the device, kernels": {"peak_mib": 11 * 1024},
                   "components one by one, kernels": {"peak_mib": 9 * 1024}},
    }  # fmt: skip
    reached = {row[0]: row[2:] for row in scripts["gpu_report"].targets(made)}
    assert reached == {
        "1024, batch 1, guidance, end to end": ("240.0 ms", "yes"),
        "one control, encoding fresh": ("+29.2%", "no"),
        "one control, encoding reused": ("+4.2%", "yes"),
        "slowest pointwise kernel, of copy bandwidth": ("71%", "yes"),
        "training attention, time over the best other": ("1.25", "no"),
        "peak at 1024, everything on the device": ("11.00 GiB", "yes"),
        "peak at 1024, components one by one": ("9.00 GiB", "no"),
    }
    assert "Stages at 1024, batch 1, graphs" in scripts["gpu_report"].page(made)


def test_a_part_that_fails_leaves_its_error_and_the_rest_goes_on(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(bench: Any) -> None:
        raise SystemExit("a library gave up")

    monkeypatch.setattr(scripts["gpu_kernels"], "ceilings", breaks)
    run = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts"]
    scripts["gpu"].main([*run, "ceilings", "pointwise", "checks"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["ceilings"]["error"] == "SystemExit: a library gave up"
    assert "copy_gb_per_s is not known, ceilings gave" in report["pointwise"]["error"]
    assert len(report["checks"]) == 4 and "a library gave up" in (tmp_path / "gpu.md").read_text()

    # a process that takes over adds to the report
    monkeypatch.undo()
    arguments = argparse.Namespace(quick=False, tiny=True, keep_times=None, device="cpu", out=tmp_path)
    scripts["gpu"].main(scripts["gpu"].rest(arguments, ["ceilings"], 60.0))
    after = json.loads((tmp_path / "gpu.json").read_text())
    assert after["ceilings"]["copy_gb_per_s"] > 0 and after["checks"] == report["checks"]
    assert set(after["seconds"]) == {"ceilings", "pointwise", "checks"}


def test_a_part_brings_the_ceilings_that_it_needs(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    scripts["gpu"].main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "pointwise"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["seconds"]) == ["ceilings", "pointwise"] and not errors(report)
    chosen = scripts["gpu"].chosen
    assert chosen(["checks"], {}) == ["checks"] and chosen(["pictures"], {"ceilings": {}}) == ["pictures"]
    assert chosen(["checks", "pictures", "ceilings"], {}) == ["ceilings", "checks", "pictures"]


def test_when_the_minutes_are_used_up_the_rest_is_skipped(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    run = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--parts", "ceilings", "tests"]
    scripts["gpu"].main([*run, "--minutes", "0.1"])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all("left of 0.1 minutes" in report[name]["skipped"] for name in ("ceilings", "tests"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        scripts["gpu"].main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_full_sizes_are_those_of_the_paper(scripts: dict[str, ModuleType]) -> None:
    sizes = scripts["gpu_setup"].full(quick=False)
    assert [schedule.length for schedule in sizes.schedules.values()] == [521, 2521, 10521]
    assert (sizes.width, sizes.heads, sizes.batches, sizes.largest.height) == (2048, 16, (1, 8), 1024)
    assert set(scripts["gpu_setup"].full(quick=True).schedules) == {"256", "1024"}
