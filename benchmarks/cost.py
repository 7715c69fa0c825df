"""How time and memory grow with resolution, batch, number of controls and length of the prompt, on this CPU.

    python benchmarks/cost.py --threads 2          # about 7 minutes
    python benchmarks/cost.py --quick --out /tmp   # small sizes, to see that it works

A backbone of middling size with random weights (width 512, 12 layers, 32 bits, guidance 3, float32) draws latents; the
published d32 tokenizer decodes apart. Each time is the least of several; memory is what tensors hold at most beyond
the weights, counted by storages. Beside them stands what `pipe.estimate` says without running. Writes cost.json, the
figure and the tables of docs/cost.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from cpu_tables import write_into

from scaleweaver.adapters import add_control
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.doctor import processor
from scaleweaver.evaluate.memory import MemoryTracker, peak_bytes
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, infinity_schedule
from scaleweaver.tokenizers.bsq import BSQTokenizer
from scaleweaver.work import decode_cost

ROOT = Path(__file__).resolve().parent.parent
ACCENT, GREY, INK = "#d1495b", "#9aa0a6", "#3c4043"
KINDS = ("canny", "depth", "pose")
MIB = 2**20


def build(*, depth: int = 12, width: int = 512, heads: int = 8) -> VARControlPipeline:
    """The backbone under test, three controls, and a tokenizer of few channels that costs next to nothing."""
    torch.manual_seed(0)
    backbone = InfinityTransformer(depth=depth, width=width, heads=heads, bits=32, text_width=2048).eval()
    vae = BSQTokenizer(bits=32, widths=(8, 8, 8, 8, 8), encoder_blocks=1, decoder_blocks=1, norm_groups=4).eval()
    pipe = VARControlPipeline(backbone, vae, guidance_scale=3.0)
    for kind in KINDS:
        pipe.controls[kind] = add_control(backbone, ScaleWeaverConfig(kind=kind), kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedule(side: int) -> ScaleSchedule:
    """The square template up to a side of so many pixels."""
    grids = infinity_schedule("1.0", "1M").grids
    return ScaleSchedule(tuple(grid for grid in grids if grid[0] * 16 <= side), position_grid=(64, 64))


def least(run: Callable[[], Any], repeats: int, budget: float) -> float:
    """Seconds of the fastest of `repeats` runs, of fewer where `budget` seconds are over."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def point(pipe: VARControlPipeline, x: float, repeats: int, *, prompt: int = 32, **arguments: Any) -> dict[str, float]:
    """Time and memory of one call, and what was estimated."""
    estimate = pipe.estimate(prompt, output_type="latent", **arguments)
    embeds = [torch.randn(prompt, 2048, generator=torch.Generator().manual_seed(0))]

    def draw() -> Any:
        return pipe(prompt_embeds=embeds, output_type="latent", seed=0, **arguments)

    with MemoryTracker() as tracker:
        start = time.perf_counter()
        draw()
        first = time.perf_counter() - start
    if first > 20:  # a long run is its own warm-up
        seconds = first
    else:  # what the first one made and keeps, tables of positions, is not of this call
        seconds = least(draw, repeats, 20)
        with MemoryTracker() as tracker:
            draw()
    found = {
        "x": x, "seconds": seconds, "peak_bytes": tracker.peak, "flops": estimate.total_flops,
        "estimated_bytes": estimate.peak_bytes - estimate.weight_bytes, "kv_bytes": estimate.kv_bytes,
    }  # fmt: skip
    print(
        f"  {x:>7g}  {seconds:7.2f} s  {tracker.peak / MIB:8.1f} MiB  {estimate.total_flops / 1e9:9.1f} GFLOP",
        flush=True,
    )
    return found


def decoder() -> BSQTokenizer:
    torch.manual_seed(0)
    return BSQTokenizer.preset("d32").eval()


def decode_points(sides: list[int], repeats: int) -> list[dict[str, float]]:
    vae, points = decoder(), []
    for side in sides:
        latent = torch.randn(1, 32, side // 16, side // 16)
        with torch.no_grad():
            peak = peak_bytes(lambda: vae.decode(latent))  # noqa: B023
            seconds = least(lambda: vae.decode(latent), repeats, 20)  # noqa: B023
        flops, expected = decode_cost(vae, side, side)
        print(f"  {side:>7}  {seconds:7.2f} s  {peak / MIB:8.1f} MiB  {flops / 1e9:9.1f} GFLOP", flush=True)
        points.append(
            {"x": side**2, "seconds": seconds, "peak_bytes": peak, "flops": flops, "estimated_bytes": expected}
        )
    return points


def exponent(points: list[dict[str, float]], name: str) -> float:
    """Slope of log(name) over log(x)."""
    slope, _ = np.polyfit(np.log([p["x"] for p in points]), np.log([p[name] for p in points]), 1)
    return float(slope)


def share(points: list[dict[str, float]], name: str) -> float:
    """What one unit of x adds, as a share of the value at the first point."""
    slope, _ = np.polyfit([p["x"] for p in points], [p[name] for p in points], 1)
    return float(slope / points[0][name])


def measure(quick: bool) -> dict[str, list[dict[str, float]]]:
    pipe, repeats = build(), 1 if quick else 3
    sides = [64, 128, 256] if quick else [256, 384, 512, 768, 1024]
    side = 128 if quick else 256
    plan = schedule(side)
    picture = torch.zeros(3, side, side)
    series: dict[str, list[dict[str, float]]] = {}
    print("resolution, by tokens")
    series["resolution"] = [point(pipe, schedule(s).length, repeats, schedule=schedule(s)) for s in sides]
    for found, s in zip(series["resolution"], sides, strict=True):
        found["side"] = s
    print("pictures at once")
    series["batch"] = [
        point(pipe, n, repeats, schedule=plan, num_images_per_prompt=n) for n in ((1, 2) if quick else (1, 2, 4, 8))
    ]
    print("controls")
    series["controls"] = [
        point(pipe, n, repeats, schedule=plan, control={kind: picture for kind in KINDS[:n]} or None) for n in range(4)
    ]
    print("tokens of the prompt")
    series["prompt"] = [
        point(pipe, n, repeats, schedule=plan, prompt=n) for n in ((8, 64) if quick else (8, 32, 128, 512))
    ]
    print("decoding with d32, by side")
    series["decode"] = decode_points([64, 128] if quick else [128, 256, 512], repeats)
    return series


def draw(series: dict[str, list[dict[str, float]]], file: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK})
    plt.rcParams.update({"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False})
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), constrained_layout=True)
    titles = {
        "resolution": ("Resolution", "tokens of all scales"), "batch": ("Pictures at once", "pictures"),
        "controls": ("Controls", "controls, encoded in the call"), "prompt": ("Length of the prompt", "tokens"),
    }  # fmt: skip
    for axis, (name, (title, label)) in zip(axes.flat, titles.items(), strict=True):
        points = series[name]
        x = np.array([p["x"] for p in points])
        seconds, flops = (np.array([p[key] for p in points]) for key in ("seconds", "flops"))
        # one speed for the whole panel, the geometric mean: where the curve leaves the dots, speed changes with size
        predicted = flops * np.exp(np.log(seconds / flops).mean())
        memory = axis.twinx()
        memory.plot(
            x, [p["peak_bytes"] / MIB for p in points], "s--", color=GREY, markersize=4, linewidth=1, label="memory"
        )
        axis.plot(x, predicted, "-", color=INK, linewidth=1, label="time by estimated FLOPs")
        axis.plot(x, seconds, "o", color=ACCENT, markersize=6, label="time")
        scale = "linear" if name == "controls" else "log"
        for each in (axis, memory):
            each.set_xscale(scale)
            each.set_yscale(scale)
            each.minorticks_off()
        axis.set_xticks(x, [f"{value:g}" for value in x])
        if name == "resolution":
            axis.set_xticks(x, [f"{p['x']:g}\n{p['side']:g} px" for p in points])
        for each, values in ((axis, [*seconds, *predicted]), (memory, [p["peak_bytes"] / MIB for p in points])):
            if scale == "linear":
                each.set_ylim(0, 1.15 * max(values))
            else:
                low, high = min(values) / 1.4, max(values) * 1.4
                ticks = [t for t in (m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)) if low <= t <= high]
                each.set_ylim(low, high)
                each.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        growth = (
            f"+{100 * share(points, 'seconds'):.0f} % each"
            if scale == "linear"
            else f"exponent {exponent(points, 'seconds'):.2f}"
        )
        axis.set_title(f"{title}: {growth}", loc="left", fontsize=10)
        axis.set_xlabel(label)
        axis.set_ylabel("time, s", color=ACCENT)
        memory.set_ylabel("memory beside weights, MiB", color=GREY)
        axis.set_zorder(memory.get_zorder() + 1)
        axis.patch.set_visible(False)
        if name == "resolution":
            handles = [one for each in (axis, memory) for one in each.get_legend_handles_labels()[0]]
            axis.legend(handles, [one.get_label() for one in handles], loc="upper left", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def table(series: dict[str, list[dict[str, float]]], setup: dict[str, Any]) -> str:
    def row(
        name: str, points: list[dict[str, float]], fit: Callable[[list[dict[str, float]], str], float], form: str
    ) -> str:
        span = f"{points[0]['x']:g} to {points[-1]['x']:g}"
        times = f"{points[0]['seconds']:.2f} to {points[-1]['seconds']:.2f} s"
        memory = f"{points[0]['peak_bytes'] / MIB:.0f} to {points[-1]['peak_bytes'] / MIB:.0f} MiB"
        fits = " | ".join(form.format(fit(points, key)) for key in ("seconds", "flops", "peak_bytes"))
        worst = max(abs(p["estimated_bytes"] / p["peak_bytes"] - 1) for p in points)
        return f"| {name} | {span} | {times} | {memory} | {fits} | {100 * worst:.1f} % |"

    lines = [
        f"{setup['cpu']}, {setup['threads']} threads, torch {setup['torch']}: `{setup['command']}`.",
        "",
        "| grows | from, to | time | memory | time as x to the | FLOPs | memory | memory estimated within |",
        "|---|---|---|---|---|---|---|---|",
        *[
            row(name, series[key], exponent, "{:.2f}")
            for key, name in (
                ("resolution", "tokens of all scales"), ("batch", "pictures at once"),
                ("prompt", "tokens of the prompt"), ("decode", "pixels, decoding with d32"),
            )
        ],
        "",
        "| grows | from, to | time | memory | each adds: time | FLOPs | memory | memory estimated within |",
        "|---|---|---|---|---|---|---|---|",
        row("controls", series["controls"], lambda points, key: 100 * share(points, key), "{:.0f} %"),
    ]  # fmt: skip
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat")
    parser.add_argument("--out", type=Path, help="write cost.json, cost.png and cost.md there, not into the repository")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    series = measure(options.quick)
    setup = {
        "cpu": processor(), "threads": options.threads, "torch": torch.__version__, "quick": options.quick,
        "command": " ".join(["python", "benchmarks/cost.py", *(sys.argv[1:] if given is None else given)]),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    fits = {
        name: {
            key: (share if name == "controls" else exponent)(points, key) for key in ("seconds", "flops", "peak_bytes")
        }
        for name, points in series.items()
    }
    folder = options.out or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps({"setup": setup, "fits": fits, "series": series}, indent=2) + "\n")
    draw(series, (options.out or ROOT / "docs" / "images") / "cost.png")
    text = table(series, setup)
    if options.out:
        (folder / "cost.md").write_text(text + "\n")
    else:
        write_into(ROOT / "docs" / "cost.md", "cost", text)
    print(f"\n{text}\n\n{setup['minutes']} minutes")


if __name__ == "__main__":
    main()
