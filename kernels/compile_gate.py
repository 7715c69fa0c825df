"""Compiles every kernel for GPUs that are not there, and tells registers, spills and shared memory of each.

    python -m scaleweaver.kernels.compile_gate [--shipped] [--target 90] [--only forward] [--into docs/kernels.md]

`make kernels` compiles what is shipped, and so does CI; without --shipped it is everything that can be launched.

Needs Triton, whose wheel holds NVIDIA's assembler, and neither a GPU nor CUDA. Exit status 1 when a kernel spills or
asks for more shared memory than a block may have. What it cannot see: speed, races, wrong results.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
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

    `shipped` marks what published models and the built-in one launch, `sample` the few that the tests compile. Pointers
    and the arguments in `aligned` are multiples of 16.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: frozenset[str] = frozenset()
    shipped: bool = True
    sample: bool = False


@dataclass(frozen=True)
class Report:
    """What the assembler made of a build. spills: instructions that read or write local memory; tensor_cores: matrix
    products that Triton asked for.
    """

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


@cache
def builds(target: int) -> Mapping[str, Build]:
    """All kernels as they are launched on this target, by name."""
    made = [build for module in MODULES for build in import_module(module).builds(target)]
    return {build.name: build for build in made}


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
    usage = _resource_usage(made.asm["cubin"])
    spilling = usage["STACK"] or usage["LOCAL"]  # disassembling takes as long as compiling: only where it tells more
    return Report(
        name=build.name,
        target=target,
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", made.asm["sass"])) if spilling else 0,
        shared=max(usage["SHARED"], made.metadata.shared),  # the file knows what is static, Triton what is dynamic
        tensor_cores=len(re.findall(r"^\s*(?:wgmma\.mma_async|mma\.sync)", made.asm["ptx"], re.MULTILINE)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def compile_named(target: int, name: str) -> Report:
    """`compile_build` by name, for processes that share no memory."""
    return compile_build(builds(target)[name], target)


def compile_all(named: Sequence[tuple[int, str]], processes: int) -> Iterator[Report]:
    """Reports in the given order, as they come."""
    if processes == 1:
        yield from map(compile_named, *zip(*named, strict=True))
        return
    # fresh processes: Triton's compiler and torch keep threads, which a forked one would lack
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_named, *zip(*named, strict=True))


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


def summary(reports: Sequence[Report]) -> Iterator[str]:
    """Lines of a Markdown table, one for each kernel, the targets side by side."""
    targets = sorted({report.target for report in reports})
    yield f"| kernel | registers on {', '.join(f'sm_{t}' for t in targets)} | shared memory, KiB | stack, spills |"
    yield "|---|---|---|---|"
    names = dict.fromkeys(report.name for report in reports)
    for name in names:
        found = [report for report in sorted(reports, key=lambda report: report.target) if report.name == name]
        registers = ", ".join(str(report.registers) for report in found)
        shared = ", ".join(f"{report.shared / 1024:.1f}" for report in found)
        worst = ", ".join(str(max(getattr(report, each) for report in found)) for each in ("stack", "spills"))
        yield f"| {name} | {registers} | {shared} | {worst} |"


def write_into(document: Path, lines: Iterable[str]) -> None:
    """Put the lines between <!-- compiled --> and <!-- /compiled -->."""
    before, mark, rest = document.read_text().partition("<!-- compiled -->\n")
    _, end, after = rest.partition("<!-- /compiled -->")
    if not mark or not end:
        raise ValueError(
            f"{document} has no place for the table; write <!-- compiled --> and <!-- /compiled --> into it"
        )
    document.write_text(before + mark + "".join(f"{line}\n" for line in lines) + end + after)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scaleweaver.kernels.compile_gate", description=__doc__)
    parser.add_argument("--target", type=int, choices=list(TARGETS), help="compute capability, all by default")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--shipped", action="store_true", help="what published models and the built-in one launch")
    parser.add_argument("--sample", action="store_true", help="the few that the tests compile")
    parser.add_argument("--into", type=Path, help="write a summary into this document, at <!-- compiled -->")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None:
        print("Triton is not installed: no kernel was compiled. pip install triton (Linux) to check them.")
        return 0
    named = [
        (target, build.name)
        for target in (TARGETS if options.target is None else [options.target])
        for build in builds(target).values()
        if options.only in build.name
        and (build.shipped or not options.shipped)
        and (build.sample or not options.sample)
    ]
    if not named:
        parser.error(f"no kernel of these has {options.only!r} in its name")
    reports: list[Report] = []
    for line in table(_watched(compile_all(named, options.jobs), reports)):
        print(line, flush=True)
    failing = [report for report in reports if not report.passes]
    print(f"\n{len(reports)} kernels compiled, {len(failing)} failing")
    if options.into:
        import triton

        head = f"Triton {triton.__version__}, {len(reports)} builds, {len(failing)} failing."
        write_into(options.into, [head, "", *summary(reports)])
    return int(bool(failing))


def _watched(reports: Iterable[Report], seen: list[Report]) -> Iterator[Report]:
    for report in reports:
        seen.append(report)
        yield report


if __name__ == "__main__":
    # neither under the interpreter, which compiles nothing, nor with what a later Triton would leave apart
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())
