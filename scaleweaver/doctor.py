"""What this installation can do and what it lacks: the findings behind `scaleweaver doctor`."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from scaleweaver.threads import find_processors

Status = Literal["ok", "note", "problem"]
EXTRAS = ("train", "train8bit", "eval", "hed", "int8", "demo", "serve", "docs", "notebooks", "dev")


@dataclass(frozen=True)
class Finding:
    """One line of the report. A "note" is optional, a "problem" stops something; `fix` is the command that helps."""

    topic: str
    name: str
    found: str
    status: Status = "ok"
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, from the interpreter to the built-in model. Imports torch where it is installed."""
    return [*_interpreter(), *_devices(), *_kernels(), *_dependencies(), *_extras(), *_built_in_model()]


def _interpreter() -> list[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 10)
    return [
        Finding("system", "python", found, "problem" if old else "ok", "install Python 3.10 or newer" if old else "")
    ]


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("system", "torch", f"cannot be imported: {error}", "problem", 'pip install "torch>=2.8"')]
    findings = [Finding("system", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"), _threads()]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = "cuda"
        findings.append(Finding("system", "device", f"cuda: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"))
    elif torch.backends.mps.is_available():
        device = "mps"
        findings.append(Finding("system", "device", "mps"))
    else:
        device = "cpu"
        findings.append(Finding("system", "device", f"cpu, {torch.backends.cpu.get_cpu_capability()}"))
    try:
        from scaleweaver.precision import auto_dtype
    except ImportError as error:
        return [
            *findings,
            Finding("system", "pipeline", f"cannot be imported: {error}", "problem", "see packages below"),
        ]
    found = f"auto means {str(auto_dtype(device)).removeprefix('torch.')} on {device}"
    return [*findings, Finding("system", "dtype", found)]


def _threads() -> Finding:
    found = find_processors()
    quota = "" if found.quota is None else f", a quota of {found.quota:g}"
    return Finding(
        "system",
        "threads",
        f"auto means {found.threads}: {found.logical} logical processors on {found.cores} cores{quota}",
    )


def _kernels() -> list[Finding]:
    """Which side of each kernel runs here, and why."""
    try:
        import torch

        from scaleweaver.kernels.dispatch import ASK, asked_for, gpu_is_served
    except ImportError:  # said above
        return []
    if not torch.cuda.is_available():
        return [Finding("system", "kernels", "the torch formulas: no NVIDIA GPU is found")]
    try:
        triton = f"Triton {version('triton')}"
    except PackageNotFoundError:
        return [Finding("system", "kernels", "the torch formulas: no Triton", "note", "pip install triton")]
    if not gpu_is_served(torch.device("cuda")):
        return [Finding("system", "kernels", "the torch formulas: the GPU is older than compute capability 8.0")]
    if not asked_for():
        return [
            Finding("system", "kernels", f"the torch formulas; {triton} is ready", "note", f"set {ASK}=1 to use it")
        ]
    return [Finding("system", "kernels", f"{triton}, as {ASK}=1 asks")]


def _check(topic: str, requirement: Requirement, fix: str, lacking: Status) -> Finding:
    wanted = str(requirement.specifier) or "any version"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding(topic, requirement.name, f"not installed, needs {wanted}", lacking, fix)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(topic, requirement.name, f"{installed}, needs {wanted}", lacking, fix)
    return Finding(topic, requirement.name, f"{installed} ({wanted})")


def _requirements(extra: str) -> list[Requirement]:
    """What our own metadata asks for on this machine: by the extra, or without any when it is empty."""
    wanted = [Requirement(line) for line in requires("scaleweaver") or []]
    plain = {str(r) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
    if not extra:
        return [r for r in wanted if str(r) in plain]
    return [r for r in wanted if str(r) not in plain and r.marker is not None and r.marker.evaluate({"extra": extra})]


def _dependencies() -> list[Finding]:
    try:
        needed = _requirements("")
    except PackageNotFoundError:
        found = "runs from a checkout that is not installed: versions cannot be checked"
        return [Finding("packages", "scaleweaver", found, "note", "pip install -e . (in the clone)")]
    return [_check("packages", r, f'pip install "{r.name}{r.specifier}"', "problem") for r in needed]


def _extras() -> list[Finding]:
    findings = []
    for extra in EXTRAS:
        try:
            checks = [_check("extras", r, "", "note") for r in _requirements(extra)]
        except PackageNotFoundError:
            return []  # _dependencies has said so
        lacking = [check for check in checks if check.status != "ok"]
        if lacking:
            found = "; ".join(f"{check.name} {check.found}" for check in lacking)
            findings.append(Finding("extras", extra, found, "note", f'pip install -e ".[{extra}]" (in a clone)'))
        else:
            findings.append(Finding("extras", extra, ", ".join(f"{check.name} {check.found}" for check in checks)))
    return findings


def _built_in_model() -> list[Finding]:
    try:
        from scaleweaver.hub import built_in_folder
    except ImportError:
        return []  # _devices has said so
    model = built_in_folder("toybox")
    if not (model / "model_index.json").is_file():
        found = f"not found at {os.fspath(model)}"
        fix = "pip install --force-reinstall --no-deps . (in a complete clone)"
        return [Finding("models", "toybox", found, "problem", fix)]
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    controls = sorted(folder.name for folder in (model / "controls").glob("*") if folder.is_dir())
    return [Finding("models", "toybox", f"{size / 1e6:.1f} MB, controls: {', '.join(controls) or 'none'}")]


def processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
