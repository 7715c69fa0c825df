"""Compiles every kernel for GPUs that are not there, and tells registers, spills and shared memory of each.

    python -m scaleweaver.kernels.compile_gate [--target 90] [--only forward] [--sample]

Needs Triton, whose wheel holds NVIDIA's assembler, and neither a GPU nor CUDA. Exit status 1 when a kernel spills or
asks for more shared memory than a block may have. What it cannot see: speed, races, wrong results.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# compute capability -> bytes of shared memory that a block may ask for
TARGETS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# each has builds(target) -> the kernels as they are launched on that target
MODULES = (
    "scaleweaver.kernels.interval_attention_launch",
    "scaleweaver.kernels.qkv_rope",
    "scaleweaver.kernels.gate_norm",
    "scaleweaver.kernels.bit_sampling",
)


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched: types of its arguments ("*bf16", "i32", "fp32"), constants, warps, stages.

    `sample` marks the few that the tests compile; pointers and the arguments in `aligned` are multiples of 16.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: frozenset[str] = frozenset()
    sample: bool = False


@dataclass(frozen=True)
class Report:
    """What the assembler made of a build. spills: instructions that read or write local memory."""

    name: str
    target: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: int

    @property
    def passes(self) -> bool:
        return self.stack == 0 and self.spills == 0 and self.shared <= TARGETS[self.target]


def builds(target: int) -> Iterator[Build]:
    """All kernels as they are launched on this target."""
    for module in MODULES:
        yield from import_module(module).builds(target)


def compile_build(build: Build, target: int) -> Report:
    """Compiles; nothing is run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, under which nothing can be compiled; unset it")
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    divisible = [n for n in names if str(signature[n]).startswith("*") or n in build.aligned]
    source = ASTSource(
        fn=build.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, sass = _resource_usage(made.asm["cubin"]), made.asm["sass"]
    return Report(
        name=build.name,
        target=target,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=max(usage["SHARED"], made.metadata.shared),  # the file knows what is static, Triton what is dynamic
        tensor_cores=len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def table(reports: Iterable[Report]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| kernel | target | registers | stack | spills | shared KiB | matrix instructions | |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in reports:
        verdict = "" if r.passes else "**fails**"
        yield (
            f"| {r.name} | sm_{r.target} | {r.registers} | {r.stack} | {r.spills} | {r.shared / 1024:.1f} | "
            f"{r.tensor_cores} | {verdict} |"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scaleweaver.kernels.compile_gate", description=__doc__)
    parser.add_argument("--target", type=int, choices=list(TARGETS), help="compute capability, all by default")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--sample", action="store_true", help="only the few that the tests compile")
    options = parser.parse_args(arguments)
    reports = []

    def compiled() -> Iterator[Report]:
        for target in TARGETS if options.target is None else [options.target]:
            for build in builds(target):
                if options.only in build.name and (build.sample or not options.sample):
                    reports.append(compile_build(build, target))
                    yield reports[-1]

    for line in table(compiled()):
        print(line, flush=True)
    return int(not reports or not all(report.passes for report in reports))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # under which nothing can be compiled
    sys.exit(main())
