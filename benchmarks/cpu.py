"""Pictures on a CPU: this library against a plain eager implementation of the same network, step by step.

Three models: the built-in one; a mid-size backbone with random weights (width 512, depth 12, 8 heads, 32 bits, a prompt
of 32 tokens) with the d32 tokenizer; the 125M architecture with random weights. Ways of one table run in turn, after a
warm-up, and ratios are those of the best runs. Peak memory is that of a fresh process per way.

python benchmarks/cpu.py [--quick] [--threads 2] [--minutes 9] [--into docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu_tables import tables, write_into
from infinity_125m_cpu import PROMPT, build

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.contracts import TextFeatures
from scaleweaver.evaluate.plain import PlainInfinity
from scaleweaver.evaluate.speed import StageTimes, Stopwatch, draw, in_fresh_process, machine, measure, peak_rss
from scaleweaver.images import read_image
from scaleweaver.kernels.attention import attend
from scaleweaver.kernels.interval_attention import attend_ranges
from scaleweaver.masks import key_ranges
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, infinity_schedule
from scaleweaver.tokenizers.bsq import BSQTokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
EDGES = ROOT / "examples" / "canny.png"
TOYBOX_PROMPT = "a large red rocket on grass at noon"
# each row takes one habit more away from the plain baseline
WITHOUT = {
    "+ text keys and values once": "text_once",
    "+ cache in place, last scale not kept": "in_place_cache",
    "+ queries and keys turned in one copy": "one_rotation",
    "+ GELU inside the product": "fused_gelu",
    "+ one logit per bit, drawn without sorting": "one_logit",
}
DECODER_WITHOUT = {"+ channels last": "channels_last", "+ smoothed without repeating": "folded_upsampling"}
PLAIN, OURS, OURS_BF16, OURS_INT8 = "plain eager, float32", "ours, float32", "ours, bfloat16", "ours, int8"


def _cumulated(steps: dict[str, str]) -> dict[str, dict[str, bool]]:
    switches = list(steps.values())
    return {name: dict.fromkeys(switches[: i + 1], True) for i, name in enumerate(steps)}


HABITS: dict[str, dict[str, bool]] = {PLAIN: {}, **_cumulated(WITHOUT)}
DECODER_HABITS: dict[str, dict[str, bool]] = {PLAIN: {}, **_cumulated(DECODER_WITHOUT)}
DECODES = (*DECODER_HABITS, OURS, OURS_BF16)

Way = Callable[[Stopwatch], Any]


def toybox(dtype: torch.dtype) -> VARControlPipeline:
    return VARControlPipeline.from_pretrained("toybox", dtype=dtype, local_files_only=True)


def mid_size(dtype: torch.dtype) -> VARControlPipeline:
    """The size that the original implementation was once measured at."""
    torch.manual_seed(0)
    return VARControlPipeline(
        transformer=_as(InfinityTransformer(width=512, depth=12, heads=8, bits=32), dtype),
        vae=_as(BSQTokenizer.preset("d32"), dtype),
        schedule=infinity_schedule("1.0", "0.06M").to_dict(),
        guidance_scale=3.0,
        temperature=0.5,
        top_k=900,
        top_p=0.97,
    )


def size_125m(dtype: torch.dtype) -> VARControlPipeline:
    torch.manual_seed(0)
    pipe = build()
    _as(pipe.transformer, dtype)
    _as(pipe.vae, dtype)
    return pipe


def _as(module: Any, dtype: torch.dtype) -> Any:
    """In a number format, but for the parts that loading leaves in float32."""
    kept = set(module._keep_in_fp32_modules or ())
    for name, parameter in module.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module.eval()


MODELS: dict[str, Callable[[torch.dtype], VARControlPipeline]] = {
    "built-in": toybox, "mid-size": mid_size, "125M": size_125m,
}  # fmt: skip


def make(model: str, dtype: torch.dtype, way: str = "") -> VARControlPipeline:
    pipe = MODELS[model](dtype)
    pipe.set_progress_bar_config(disable=True)
    if way == OURS_INT8:
        pipe.quantize("int8")
    return pipe


def features_of(model: str, pipe: VARControlPipeline) -> TextFeatures:
    """The prompt, read; for the mid-size model, which has no text encoder, 32 random tokens."""
    if model != "mid-size":
        return pipe.encode_prompt(TOYBOX_PROMPT if model == "built-in" else PROMPT)
    return TextFeatures(torch.randn(32, 2048, generator=torch.Generator().manual_seed(1)), (32,))


class Case:
    """One model in its number formats, made when first asked for, on one text; `first` is the way that reads it."""

    def __init__(self, model: str, first: str = OURS) -> None:
        self.model = model
        self._pipes: dict[str, VARControlPipeline] = {}
        self.text = features_of(model, self.pipe(first))
        config = self.pipe(first).config["schedule"]
        own = ScaleSchedule.from_dict(config) if "grids" in config else infinity_schedule("1.0", config["budget"])
        self._schedules = {None: own, 512: infinity_schedule("1.0", "0.25M")}

    def pipe(self, way: str) -> VARControlPipeline:
        name = way if way in (OURS_BF16, OURS_INT8) else OURS
        if name not in self._pipes:
            dtype = torch.float32 if name == OURS else torch.bfloat16
            self._pipes[name] = make(self.model, dtype, name)
        return self._pipes[name]

    def generation(self, way: str, side: int | None = None) -> Way:
        """A latent from known text."""
        pipe, schedule = self.pipe(way), self._schedules[side]
        if way not in HABITS:
            return lambda watch: draw(
                pipe, None, watch, prompt_embeds=self.text, schedule=schedule, seed=7, decode=False
            )
        plain = PlainInfinity(pipe.transformer, pipe.vae, **HABITS[way])
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        numbers = {name: pipe.config[name] for name in names}

        def run(watch: Stopwatch) -> None:
            seed = [torch.Generator().manual_seed(7)]
            plain.generate(
                self.text, schedule, generators=seed, **numbers,
                on_scale=lambda step, logits, latent: watch.lap(f"scale {step.index + 1}, {step.h}x{step.w}"),
            )  # fmt: skip

        return run

    def decoding(self, way: str) -> Way:
        """A picture from a latent."""
        pipe = self.pipe(way)
        side = self._schedules[None].final_grid
        generator = torch.Generator().manual_seed(3)
        latent = torch.randn(1, pipe.vae.target.bits, *side, generator=generator)
        if way in DECODER_HABITS:
            plain = PlainInfinity(pipe.transformer, pipe.vae, **DECODER_HABITS[way])
            return lambda watch: plain.decode(latent)

        def run(watch: Stopwatch) -> None:
            with torch.inference_mode():
                pipe.vae.decode(latent)

        return run

    def guidance(self, way: str, apart: bool) -> Way:
        """Both guidance branches in one batch; `apart`: a run for each, of one row."""
        pipe, schedule = self.pipe(way), self._schedules[None]
        runs, scale = (2, 1.0) if apart else (1, None)

        def run(watch: Stopwatch) -> None:
            for _ in range(runs):
                pipe(prompt_embeds=self.text, schedule=schedule, seed=7, guidance_scale=scale, output_type="latent")

        return run

    def picture(self, way: str, controlled: bool) -> Way:
        """All that a user waits for once the model is there: prompt, control, scales, decoding."""
        pipe = self.pipe(way)
        prompt = TOYBOX_PROMPT if self.model == "built-in" else PROMPT
        given: dict[str, Any] = {"prompt_embeds": self.text} if pipe.text_encoder is None else {}

        def run(watch: Stopwatch) -> None:
            control = {"canny": read_image(EDGES)} if controlled else None
            draw(pipe, None if given else prompt, watch, control=control, seed=7, **given)

        return run


def generation_ways() -> list[str]:
    """int8 where the library that computes in it is there."""
    return [*HABITS, OURS, OURS_BF16, *([OURS_INT8] if find_spec("torchao") else [])]


def attention(dtype: torch.dtype) -> dict[str, Way]:
    """As in training and in encoding a control: the queries of all scales, hidden keys masked or never computed."""
    schedule = infinity_schedule("1.0", "0.06M")
    ranges, tokens = key_ranges(schedule.steps, "block_causal"), schedule.length
    made = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 8, tokens, 64, generator=made).to(dtype) for _ in range(3))
    mask = ranges.dense(tokens, q.device)

    @torch.inference_mode()
    def masked(watch: Stopwatch) -> None:
        attend(q, k, v, mask=mask)

    @torch.inference_mode()
    def sliced(watch: Stopwatch) -> None:
        attend_ranges(q, k, v, ranges)

    return {"one call, with a mask": masked, "a call for each scale": sliced}


def with_threads(count: int, way: Way) -> Way:
    def run(watch: Stopwatch) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            way(watch)
        finally:
            torch.set_num_threads(before)

    return run


class Bench:
    """The report that grows, and the minutes left for it."""

    def __init__(self, minutes: float, repeats: int) -> None:
        self.ends = time.monotonic() + 60 * minutes
        self.repeats = repeats
        self.report: dict[str, Any] = {"compared": [], "pictures": [], "peaks": [], "skipped": []}

    def compare(self, model: str, what: str, ways: dict[str, Way], seconds: float, needed: float) -> None:
        """One table; seconds: no round begins after so many. Left out where fewer than `needed` are left."""
        if self.short(f"{model}: {what}", needed):
            return
        times = measure(ways, repeats=self.repeats, seconds=seconds)
        self.report["compared"].append({"model": model, "what": what, "ways": _against_the_first(times)})
        print(
            f"{model}, {what}: " + ", ".join(f"{name} {one.minimum():.3f}" for name, one in times.items()), flush=True
        )

    def short(self, what: str, needed: float) -> bool:
        if self.ends - time.monotonic() >= needed:
            return False
        self.report["skipped"].append(what)
        return True


def _against_the_first(times: dict[str, StageTimes]) -> dict[str, Any]:
    first = next(iter(times.values())).minimum()
    return {name: {"times_faster": round(first / one.minimum(), 3), **one.to_dict()} for name, one in times.items()}


def compare_models(bench: Bench, quick: bool, threads: int) -> None:
    for model in MODELS:
        case = Case(model)
        small = model == "built-in"
        ways = {way: case.generation(way) for way in generation_ways()}
        bench.compare(model, "generation", ways, 40, 10 if small else 30)
        decodes = {way: case.decoding(way) for way in DECODES}
        bench.compare(model, "decoding", decodes, 30, 5 if small else 20)
        if model == "mid-size" and not quick:
            counts = sorted({1, threads})
            bench.compare(
                model, "generation by threads",
                {
                    f"{way}, threads: {n}": with_threads(n, case.generation(way))
                    for way in (PLAIN, OURS_BF16)
                    for n in counts
                },
                20, 20,
            )  # fmt: skip
            rows = {
                "a run for each branch": case.guidance(OURS_BF16, apart=True),
                "one batch": case.guidance(OURS_BF16, apart=False),
            }
            bench.compare(model, "guidance branches, ours, bfloat16", rows, 12, 15)
            for dtype in (torch.float32, torch.bfloat16):
                name = str(dtype).removeprefix("torch.")
                bench.compare(model, f"attention of all scales at once, {name}", attention(dtype), 6, 10)
            large = {way: case.generation(way, 512) for way in (PLAIN, OURS, OURS_BF16)}
            bench.compare(model, "generation, 512x512", large, 20, 60)
        for controlled in (False, True) if small else (False,):
            if bench.short(f"{model}: stages", 15):
                continue
            shown = {way: case.picture(way, controlled) for way in (OURS, OURS_BF16)}
            for way, one in measure(shown, repeats=bench.repeats, seconds=15).items():
                bench.report["pictures"].append({"model": model, "controlled": controlled, "way": way, **one.to_dict()})
        del case
        gc.collect()


def cold_generate(bench: Bench, runs: int) -> None:
    """`scaleweaver generate` from nothing but a warm file cache."""
    if bench.short("cold generate", 10 * (runs + 1)):
        return
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        code = "from scaleweaver.cli import main; main()"
        options = ["--control", f"canny={EDGES}", "--seed", "7", "--out", f"{folder}/picture.png"]
        for _ in range(runs + 1):
            began = time.perf_counter()
            command = [sys.executable, "-c", code, "generate", TOYBOX_PROMPT, *options]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
    kept = seconds[1:]  # the first fills the file cache
    bench.report["cold_generate"] = {
        "runs": runs, "first": round(seconds[0], 3), "min": round(min(kept), 3), "median": round(median(kept), 3),
    }  # fmt: skip
    print(f"cold generate: {min(kept):.2f} s", flush=True)


def peaks(bench: Bench, models: Sequence[str], threads: int) -> None:
    for model in models:
        for way in (PLAIN, OURS, OURS_BF16):
            if bench.short(f"{model}, {way}: peak memory", 25):
                continue
            command = [__file__, "--one", model, way, "--threads", str(threads)]
            found = in_fresh_process(command, threads=threads)
            bench.report["peaks"].append({"model": model, "way": way, **found})
            print(f"peak of {model}, {way}: {found['peak_bytes'] / 2**20:.0f} MiB", flush=True)


def one_process(model: str, way: str) -> dict[str, Any]:
    """One picture from known text in this process, and the most memory that it took."""
    imports = peak_rss()
    case = Case(model, way)
    loaded = peak_rss()
    watch = Stopwatch()
    case.generation(way)(watch)
    case.decoding(way)(watch)
    return {"imports_bytes": imports, "loaded_bytes": loaded, "peak_bytes": peak_rss()}


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and what was reached; None where it was not measured."""
    found: list[dict[str, Any]] = []

    def add(name: str, aim: str, value: float | None, reached: bool | None) -> None:
        found.append({"target": name, "aim": aim, "measured": value, "reached": reached})

    compared = {(one["model"], one["what"]): one["ways"] for one in report["compared"]}
    for what in ("generation", "decoding"):
        ways = compared.get(("mid-size", what), {})
        for way in (OURS, OURS_BF16):
            value = ways[way]["times_faster"] if way in ways else None
            add(f"mid-size, {what}, {way}, against plain", "at least 2.5x", value, value and value >= 2.5)
    warm = [one for one in report["pictures"] if one["model"] == "built-in" and one["controlled"]]
    for one in warm:
        value = one["stages"]["total"]["median"]
        add(f"built-in model, controlled picture, {one['way']}", "under 1 s", value, value < 1)
    cold = report.get("cold_generate", {}).get("median")
    add("cold scaleweaver generate, controlled", "under 6 s", cold, cold and cold < 6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, no 512x512, peaks of the built-in model only"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=9.0, help="what no longer fits is skipped, and named")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--into", type=Path, help="write the tables into this document, at <!-- cpu -->")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(one_process(*arguments.one)))
        return

    bench = Bench(arguments.minutes, 2 if arguments.quick else 5)
    bench.report = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **bench.report}
    compare_models(bench, arguments.quick, arguments.threads)
    cold_generate(bench, 1 if arguments.quick else 4)
    peaks(bench, list(MODELS)[: 1 if arguments.quick else None], arguments.threads)
    bench.report["targets"] = targets(bench.report)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(bench.report, indent=2) + "\n", encoding="utf-8")
    text = tables(bench.report)
    print("\n" + text)
    if arguments.into:
        write_into(arguments.into, "cpu", text)


if __name__ == "__main__":
    main()
