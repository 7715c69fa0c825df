"""Everything about a GPU in one run of less than ten minutes: are the kernels right, how fast is what, is it enough?

The model has the sizes of Infinity-2B with flan-t5-xl and the d32 tokenizer, and random weights: no checkpoint is read.
Rates are held against a copy and a matrix product that the same run measures, times against a floor computed from
them. A part that fails leaves its error in the report and the next one goes on; when the minutes are used up, what is
left is skipped. The report is written after every part.

python benchmarks/gpu.py                                        all parts, on a GPU
python benchmarks/gpu.py --parts ceilings checks                some of them
python benchmarks/gpu.py --device cpu --tiny --out /tmp/trial   every line that needs no GPU, in less than a minute
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# in the order of a first run: what is wrong shows before what is slow
PARTS = (
    "ceilings", "checks", "pointwise", "cached_attention", "same_pictures", "waits", "pictures", "training_attention",
    "decoder", "tiles", "memory", "tests",
)  # fmt: skip
HELD_AGAINST_CEILINGS = ("pointwise", "pictures")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    if arguments.device == "cpu":
        # before Triton is imported: without a GPU the kernels run in its interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch
    from gpu_setup import Bench, full, tiny

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no NVIDIA GPU; --device cpu --tiny tries the script without one")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    bench = Bench(device, tiny() if arguments.tiny else full(arguments.quick), arguments.minutes)
    torch.manual_seed(0)
    report = bench.report
    report |= {"command": " ".join(["python", *arguments.given]), "machine": bench.machine, "seconds": {}}
    if arguments.go_on:
        report |= json.loads((arguments.out / "gpu.json").read_text(encoding="utf-8"))
    parts = load(bench)
    names = chosen(arguments.parts, report)
    for number, name in enumerate(names):
        began = time.perf_counter()
        print(f"{name} ... {bench.left():.0f} s left", flush=True)
        report[name] = bench.attempt(lambda name=name: once(bench, parts[name]))
        report["seconds"][name] = round(time.perf_counter() - began, 1)
        write(report, arguments.out)
        if bench.lost():
            # nothing works on the device any more in this process: a new one goes on with the rest
            report["lost_in"] = [*report.get("lost_in", []), name]
            write(report, arguments.out)
            os.execv(sys.executable, [sys.executable, __file__, *rest(arguments, names[number + 1 :], bench.left())])
    return report


def chosen(parts: Sequence[str] | None, report: dict[str, Any]) -> list[str]:
    """The parts in their order, before them the ceilings where some are held against them."""
    names = list(PARTS if parts is None else parts)
    if "ceilings" in report or not set(HELD_AGAINST_CEILINGS) & set(names):
        return names
    return ["ceilings", *(name for name in names if name != "ceilings")]


def rest(arguments: argparse.Namespace, parts: Sequence[str], seconds: float) -> list[str]:
    """The arguments of a process that does what is left and adds it to the report."""
    kept = [f"--{name}" for name in ("quick", "tiny") if getattr(arguments, name)]
    kept += ["--keep-times", str(arguments.keep_times)] if arguments.keep_times else []
    kept += ["--device", arguments.device, "--out", str(arguments.out), "--minutes", str(max(seconds, 0) / 60)]
    return [*kept, "--go-on", "--parts", *parts]


def once(bench: Any, part: Callable[[], Any]) -> Any:
    bench.need(10)
    return part()


def load(bench: Any) -> dict[str, Callable[[], Any]]:
    """The parts by name. What cannot even be imported is an error of the parts that need it."""

    def kernels(name: str) -> Callable[[], Any]:
        def call() -> Any:
            import gpu_kernels

            return getattr(gpu_kernels, name)(bench)

        return call

    def pictures(name: str, *, model: bool = True) -> Callable[[], Any]:
        def call() -> Any:
            import gpu_pictures

            if model and not made:
                began = time.perf_counter()
                made.append(gpu_pictures.pipeline(bench))
                bench.synchronize()
                bench.report["seconds"]["building the model"] = round(time.perf_counter() - began, 1)
            return getattr(gpu_pictures, name)(bench, *made[: int(model)])

        return call

    made: list[Any] = []
    below = ("ceilings", "checks", "pointwise", "cached_attention", "training_attention", "tests")
    return {name: kernels(name) for name in below} | {
        name: pictures(name, model=name != "tiles")
        for name in ("same_pictures", "waits", "pictures", "decoder", "tiles", "memory")
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """gpu.json, gpu.md, and the timings in the form of the dispatcher's table."""
    from gpu_report import page

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(page(report), encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, help="these alone, in this order; ceilings too where they need them"
    )
    parser.add_argument("--go-on", action="store_true", help="add to the report that is there")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing that would not end before")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, batches and repeats")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try this script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json, gpu.md, attention_times.json")
    parser.add_argument("--keep-times", type=Path, help="add the timings of attention to this table of the dispatcher")
    arguments = parser.parse_args(given)
    arguments.given = sys.argv if given is None else ["benchmarks/gpu.py", *given]
    report = run(arguments)
    entries = report.get("cached_attention", {}).get("entries")
    if entries:
        from gpu_kernels import write_entries

        write_entries(entries, arguments.out / "attention_times.json")
        if arguments.keep_times:
            write_entries(entries, arguments.keep_times)
    print((arguments.out / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
