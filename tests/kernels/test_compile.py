"""Kernels compiled for GPUs that are not there: no spills, and shared memory that a block may have."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaleweaver.kernels.compile_gate import (
    TARGETS,
    Build,
    Report,
    builds,
    compile_build,
    summary,
    table,
    write_into,
)

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

GOOD = Report("x", 80, registers=255, stack=0, spills=0, shared=TARGETS[80], tensor_cores=8)


def test_verdict() -> None:
    assert GOOD.passes
    assert not replace(GOOD, stack=8).passes and not replace(GOOD, spills=1).passes
    assert not replace(GOOD, target=89).passes  # a smaller GPU
    *_, good, bad = table([GOOD, replace(GOOD, stack=8)])
    assert good == "| x | sm_80 | 255 | 0 | 0 | 163.0 | 8 |  |" and bad.endswith("| **fails** |")


def test_the_interpreter_compiles_nothing() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("there is a GPU, so kernels are compiled here")
    with pytest.raises(RuntimeError, match="unset it"):
        compile_build(Build("x", None, {}, {}), 80)


def test_a_document_shows_a_summary(tmp_path: Path) -> None:
    reports = [GOOD, replace(GOOD, target=90, registers=128), replace(GOOD, name="y", target=90, spills=3)]
    lines = list(summary(reports))
    assert lines[0].startswith("| kernel | registers on sm_80, sm_90 |")
    assert lines[2:] == ["| x | 255, 128 | 163.0, 163.0 | 0, 0 |", "| y | 255 | 163.0 | 0, 3 |"]
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- compiled -->\nold\n<!-- /compiled -->\nafter\n")
    for _ in range(2):
        write_into(document, ["new"])
        assert document.read_text() == "before\n<!-- compiled -->\nnew\n<!-- /compiled -->\nafter\n"
    document.write_text("no place")
    with pytest.raises(ValueError, match="has no place"):
        write_into(document, ["new"])


def test_what_is_shipped() -> None:
    for target in TARGETS:
        shipped = [build for build in builds(target).values() if build.shipped]
        assert 40 < len(shipped) < len(builds(target)) / 2
        for word in ("forward", "backward", "bf16 D=128", "fp32 D=64", "both near", "qkv_rope", "gate_norm", "codes"):
            assert any(word in build.name for build in shipped), word


@pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this build of Triton has no NVIDIA assembler")
def test_no_kernel_spills() -> None:
    """The heaviest of what is launched; `make kernels` compiles what is shipped."""
    command = [sys.executable, "-m", "scaleweaver.kernels.compile_gate", "--sample", "--jobs", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "0 failing" in run.stdout, run.stdout + run.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if " sm_" in line]
    assert {row[1] for row in rows} == {f"sm_{target}" for target in TARGETS}
    assert all(row[3:5] == ["0", "0"] and row[7] == "" for row in rows)
    attention = [row for row in rows if row[0].startswith("interval")]
    assert len(attention) > 6 and all(int(row[6]) > 0 for row in attention)  # on tensor cores
