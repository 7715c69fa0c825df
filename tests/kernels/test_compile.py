"""Kernels compiled for GPUs that are not there: no spills, and shared memory that a block may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaleweaver.kernels.compile_gate import TARGETS, Build, Report, compile_build, table

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


@pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this build of Triton has no NVIDIA assembler")
def test_no_kernel_spills() -> None:
    """The heaviest of what is launched; `python -m scaleweaver.kernels.compile_gate` compiles all."""
    code = (
        "import json, dataclasses\n"
        "from scaleweaver.kernels.compile_gate import TARGETS, builds, compile_build\n"
        "some = [(build, target) for target in TARGETS for build in builds(target) if build.sample]\n"
        "print(json.dumps([dataclasses.asdict(compile_build(*each)) for each in some]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # what later versions of Triton will not do unless told: multiplication and addition in one instruction
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reports = [Report(**values) for values in json.loads(run.stdout)]
    assert {report.target for report in reports} == set(TARGETS)
    failing = [report for report in reports if not report.passes]
    assert not failing, "\n".join(table(failing))
    attention = [report for report in reports if report.name.startswith("interval")]
    assert len(attention) > 6 and all(report.tensor_cores > 0 for report in attention)
