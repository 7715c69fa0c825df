"""The parts of gpu.py that draw whole pictures: latency by stage, memory, and how near both come to what must be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from encode_control import lines
from gpu_setup import CONTROLS, Bench, pipeline
from infinity_125m_cpu import PROMPT
from torch import Tensor

from scaleweaver.conditions import make_generators
from scaleweaver.contracts import SamplerState
from scaleweaver.control_images import EncodedControl
from scaleweaver.evaluate.plain import PlainInfinity
from scaleweaver.evaluate.speed import TOTAL, StageTimes, Stopwatch
from scaleweaver.kernels.dispatch import use_kernels
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, ScaleStep
from scaleweaver.tokenizers.tiling import Tiles

__all__ = ["decoder", "memory", "pictures", "pipeline", "same_pictures", "tiles", "waits"]

GUIDANCE = 4.0
MODES = ("eager", "kernels", "graphs", "graphs without kernels")


class CacheWatch:
    """A search that chooses nothing and remembers how large the cache is after each scale."""

    def __init__(self) -> None:
        self.nbytes: list[int] = []

    def select(self, state: SamplerState, step: ScaleStep) -> Tensor | None:
        self.nbytes.append(state.cache.nbytes())
        return None


@contextmanager
def drawing(pipe: VARControlPipeline, mode: str) -> Iterator[None]:
    """One of MODES, with graphs of its own that are freed at the end."""
    if mode.startswith("graphs"):
        pipe.enable_graphs()
    try:
        with use_kernels(mode in ("kernels", "graphs")):
            yield
    finally:
        pipe.disable_graphs()


@torch.no_grad()
def draw(
    bench: Bench, pipe: VARControlPipeline, plan: ScaleSchedule, batch: int, controls: Mapping[str, Any], seed: int
) -> dict[str, float]:
    """One picture from the prompt to its pixels: seconds by stage. `controls` are pictures, or encoded ones."""
    watch = Stopwatch(bench.device)
    text = pipe.encode_prompt(PROMPT)
    watch.lap("text encoder")
    encoded = {
        kind: image if isinstance(image, EncodedControl) else pipe.encode_control(image, kind, schedule=plan)
        for kind, image in controls.items()
    }
    watch.lap("encoding controls")
    pipe_call = {"schedule": plan, "guidance_scale": GUIDANCE, "num_images_per_prompt": batch, "seed": seed}
    drawn: Any = pipe(
        prompt_embeds=text, control=encoded or None, output_type="latent", **pipe_call,
        callback_on_step_end=lambda _, index, *__: watch.lap(scale_name(index)),
    )  # fmt: skip
    watch.lap("rest")
    pipe._decode(drawn.latent)
    watch.lap("decoder")
    return watch.read()


def scale_name(index: int) -> str:
    return f"scale {index}" if index else "conditions and scale 0"


def case(
    bench: Bench, pipe: VARControlPipeline, side: str, batch: int, count: int, encoding: str, mode: str
) -> dict[str, Any]:
    """Latency and memory of one way to draw one kind of picture, the first call apart."""
    plan = bench.sizes.schedules[side]
    pictures = {kind: lines(plan.height, plan.width, i) for i, kind in enumerate(CONTROLS[:count])}
    found: dict[str, Any] = {"side": side, "batch": batch, "controls": count, "encoding": encoding, "mode": mode}
    with drawing(pipe, mode):
        controls: dict[str, Any] = dict(pictures)
        if encoding == "reused":
            controls = {kind: pipe.encode_control(image, kind, schedule=plan) for kind, image in pictures.items()}
        found |= repeated(bench, lambda seed: draw(bench, pipe, plan, batch, controls, seed))
        if pipe.graphs is not None:
            found["graphs"] = {"kept": pipe.graphs.kept, **pipe.graphs.counts}
            found["graph_buffers_mib"] = round(pipe.graphs.nbytes() / 2**20)
    return found


def repeated(bench: Bench, run: Callable[[int], dict[str, float]]) -> dict[str, Any]:
    """Medians of several runs, wall clock and stages, and their peak memory; the first run apart."""
    began = time.perf_counter()
    run(0)
    found: dict[str, Any] = {"first_call_s": round(time.perf_counter() - began, 3)}
    times, walls = StageTimes(), []
    with bench.peak(found):
        while len(walls) < bench.sizes.repeats and (not walls or bench.left() > 2 * walls[-1] / 1000):
            began = time.perf_counter()
            times.runs.append(run(len(walls) + 1))
            walls.append((time.perf_counter() - began) * 1000)
    stages = {name: round(times.median(name) * 1000, 4) for name in times.stages if name != TOTAL}
    return {
        **found, "total_ms": round(median(walls), 3), "spread_ms": round(max(walls) - min(walls), 3),
        "stages_ms": stages, "runs": len(walls),
    }  # fmt: skip


def floors(bench: Bench, pipe: VARControlPipeline, side: str, batch: int, count: int) -> dict[str, Any]:
    """What a picture must cost: its products over the measured rate, or its bytes over the measured bandwidth.

    Products as `pipe.estimate` counts them. Bytes are weights, read once a stage, and the history, read at every scale.
    """
    plan = bench.sizes.schedules[side]
    rate, bandwidth = bench.ceiling("matmul_tflop_per_s") * 1e9, bench.ceiling("copy_gb_per_s") * 1e6  # per ms
    call: dict[str, Any] = {"schedule": plan, "guidance_scale": GUIDANCE, "num_images_per_prompt": batch}
    told = pipe.estimate(PROMPT, control=list(CONTROLS[:count]) or None, **call)
    blocks = sum(x.nbytes for x in pipe.transformer.blocks.parameters())
    encoding = told.flops.get("control encoder", 0) + told.flops.get("control prefill", 0)
    ms = {
        "text encoder": max(told.flops["text encoder"] / rate, told.weights["text_encoder"] / bandwidth),
        "encoding controls": encoding / rate,
        "decoder": max(told.flops["decode"] / rate, told.weights["vae"] / bandwidth),
    }
    past = [0, *(scale.kv_bytes for scale in told.scales)]
    for scale, history in zip(told.scales, past, strict=False):
        ms[scale_name(scale.step.index)] = max(scale.flops / rate, (blocks + history) / bandwidth)
    ms[scale_name(0)] += told.flops["text keys and values"] / rate
    watch = CacheWatch()
    if count == 0:  # what was told, against what is
        pipe(PROMPT, search=watch, seed=0, output_type="latent", **call)
    fresh = sum(ms.values())
    return {
        "side": side, "batch": batch, "controls": count, "kv_bytes": told.kv_bytes,
        "measured_kv_bytes": max(watch.nbytes, default=None), "control_bytes": sum(told.bank_bytes.values()),
        "told_peak_mib": round(told.peak_bytes / 2**20), "tflop": {k: v / 1e12 for k, v in told.flops.items()},
        "floor_ms": {"fresh": round(fresh, 4), "reused": round(fresh - ms["encoding controls"], 4)},
        "stages_ms": {name: round(value, 5) for name, value in ms.items()},
    }  # fmt: skip


def pictures(bench: Bench, pipe: VARControlPipeline) -> dict[str, Any]:
    """All sizes: without controls in every mode, then what controls and batches cost in the fastest of them."""
    found: dict[str, Any] = {"cases": [], "floors": [], "plain": []}
    fastest: dict[str, str] = {}

    def add(side: str, batch: int, count: int, encoding: str, mode: str, seconds: float) -> dict[str, Any]:
        bench.need(seconds)
        made = bench.attempt(partial(case, bench, pipe, side, batch, count, encoding, mode))
        entry = {"side": side, "batch": batch, "controls": count, "encoding": encoding, "mode": mode, **made}
        found["cases"].append(entry)
        return entry

    def all_cases() -> None:
        for side in reversed(bench.sizes.schedules):  # what the targets are about comes first
            found["plain"].append({"side": side, **bench.attempt(partial(plain, bench, pipe, side))})
            # the interpreter of a CPU takes its time: once is enough there
            modes = MODES if bench.cuda or side == list(bench.sizes.schedules)[-1] else MODES[:1]
            tried = [add(side, 1, 0, "none", mode, 15) for mode in modes]
            done = [entry for entry in tried if "total_ms" in entry]
            mode = fastest[side] = min(done, key=lambda entry: entry["total_ms"])["mode"] if done else "eager"
            for count in (0, 1, 2):
                bench.need(10)
                found["floors"].append(bench.attempt(partial(floors, bench, pipe, side, 1, count)))
            for count in (1, 2):
                for encoding in ("fresh", "reused"):
                    add(side, 1, count, encoding, mode, 10)
            for batch in bench.sizes.batches[1:]:
                add(side, batch, 0, "none", mode, 25)
                add(side, batch, 1, "fresh", mode, 25)
                found["floors"] += [bench.attempt(partial(floors, bench, pipe, side, batch, n)) for n in (0, 1)]

        # the rest of what batches cost comes last, and only where minutes are left for the parts that follow
        for side, mode in fastest.items():
            for batch in bench.sizes.batches[1:]:
                for count, encoding in ((1, "reused"), (2, "fresh"), (2, "reused")):
                    add(side, batch, count, encoding, mode, 180)
                found["floors"].append(bench.attempt(partial(floors, bench, pipe, side, batch, 2)))

    stopped = bench.attempt(all_cases)
    return {**found, **(stopped or {})}


@torch.no_grad()
def plain(bench: Bench, pipe: VARControlPipeline, side: str) -> dict[str, Any]:
    """The same network with the habits of the original implementation, from the prompt to the pixels."""
    bench.need(20)
    plan = bench.sizes.schedules[side]
    network = PlainInfinity(pipe.transformer, pipe.vae, autocast=torch.bfloat16 if bench.cuda else None)

    def run(seed: int) -> dict[str, float]:
        watch = Stopwatch(bench.device)
        text = pipe.encode_prompt(PROMPT)
        watch.lap("text encoder")
        latent = network.generate(
            text, plan, generators=make_generators(seed, 1), guidance_scale=GUIDANCE, temperature=1.0, top_p=0.97,
            on_scale=lambda step, *_: watch.lap(scale_name(step.index)),
        )  # fmt: skip
        network.decode(latent)
        watch.lap("decoder")
        return watch.read()

    with use_kernels(False):
        return repeated(bench, run)


def waits(bench: Bench, pipe: VARControlPipeline) -> dict[str, Any]:
    """Whether the host waits for the device between scales: CUDA raises where it would."""
    plan = bench.sizes.largest
    last = len(plan) - 1

    def watched(mode: str) -> str:
        def after(_: Any, index: int, step: ScaleStep, __: Any) -> None:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default" if index == last else "error")

        controls = {kind: lines(plan.height, plan.width, 0) for kind in CONTROLS[:1]}
        with drawing(pipe, mode):
            for given in (None, controls):
                for callback in (None, after):  # at first tables are made and kernels compiled
                    pipe(
                        PROMPT, schedule=plan, guidance_scale=[GUIDANCE] * last + [1.0], seed=1, control=given,
                        output_type="latent", callback_on_step_end=callback,
                    )  # fmt: skip
        return "does not wait" if bench.cuda else "nothing to wait for on this device"

    def guarded(mode: str) -> str:
        try:
            return watched(mode)
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")

    return {mode: bench.attempt(partial(guarded, mode)) for mode in (MODES if bench.cuda else MODES[:1])}


def same_pictures(bench: Bench, pipe: VARControlPipeline) -> dict[str, Any]:
    """Bits that differ from those of the eager run, by mode: none between a mode and its graphs."""
    plan = next(iter(bench.sizes.schedules.values()))
    controls = {kind: lines(plan.height, plan.width, i) for i, kind in enumerate(CONTROLS)}
    bits: dict[str, list[Tensor]] = {}

    def codes(mode: str) -> list[Tensor]:
        with drawing(pipe, mode):
            for _ in range(2):  # the second is replayed
                drawn: Any = pipe(PROMPT, schedule=plan, seed=1, control=controls, output_type="latent")
        return list(drawn.codes)

    found = {}
    for mode in MODES:
        made = bench.attempt(partial(codes, mode))
        if isinstance(made, dict):
            found[mode] = made
            continue
        bits[mode] = made
        other = {"graphs": "kernels"}.get(mode, "eager")
        if other in bits:
            apart = [(a != b).sum() for a, b in zip(made, bits[other], strict=True)]
            total = sum(x.numel() for x in made)
            found[mode] = {"against": other, "bits": total, "differ": int(sum(apart)), "first_scale": int(apart[0])}
    return found


def decoder(bench: Bench, pipe: VARControlPipeline) -> dict[str, Any]:
    """Time and peak memory of decoding the largest picture, whole and in tiles."""
    height, width = pipe.vae.target.final_grid(bench.sizes.largest)
    latent = bench.random(1, int(bench.sizes.vae["bits"]), height, width, dtype=torch.float32)
    latent = latent.sign() / latent.shape[1] ** 0.5 + 0.3 * latent / latent.shape[1] ** 0.5
    side = bench.sizes.largest.height
    ways: dict[str, Callable[[Tensor], Tensor]] = {"whole": pipe.vae.decode}
    sizes = (side // 2, max(side // 4, 12))
    ways |= {f"exact tiles of {n}": partial(Tiles(n).decode, pipe.vae) for n in sizes}
    ways |= {f"blended tiles of {n}": partial(Tiles(n, exact=False).decode, pipe.vae) for n in sizes}
    found: dict[str, Any] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        pipe.vae.to(memory_format=layout)
        name = "channels last" if layout == torch.channels_last else "contiguous"
        for way, decode in ways.items() if layout == torch.channels_last else [("whole", ways["whole"])]:
            found[f"{way}, {name}"] = bench.attempt(partial(_decoding, bench, decode, latent))
    return found


@torch.inference_mode()
def _decoding(bench: Bench, decode: Callable[[Tensor], Tensor], latent: Tensor) -> dict[str, Any]:
    bench.need(5)
    found: dict[str, Any] = {}
    decode(latent)
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    with bench.peak(found):
        decode(latent)
    if bench.cuda:
        found["above_weights_mib"] = found["peak_mib"] - round(before / 2**20)
    return {**found, "ms": round(bench.milliseconds(lambda: decode(latent), 300), 3)}


def tiles(bench: Bench) -> dict[str, Any]:
    """How far tiles are from the whole with a tokenizer that was trained: the built-in one, four of its pictures."""
    pipe = VARControlPipeline.from_pretrained("toybox").to(bench.device)
    pipe.set_progress_bar_config(disable=True)
    drawn: Any = pipe("a red cube on grass at noon", seed=0, num_images_per_prompt=4, output_type="latent")
    latent = torch.cat([torch.cat([*drawn.latent[:2, None]], -1), torch.cat([*drawn.latent[2:, None]], -1)], -2)
    found = {}
    with torch.inference_mode():
        whole = pipe.vae.decode(latent) / 2 + 0.5
        for exact in (True, False):
            for size in (128, 64):
                apart = Tiles(size, exact=exact).decode(pipe.vae, latent) / 2 + 0.5 - whole
                found[f"{'exact' if exact else 'blended'} tiles of {size}, picture of {whole.shape[-1]}"] = {
                    "largest_of_255": float(apart.abs().max() * 255),
                    "psnr_db": float(-10 * apart.square().mean().clamp_min(1e-20).log10()),
                }
    return found


def memory(bench: Bench, pipe: VARControlPipeline) -> dict[str, Any]:
    """Peak memory of the largest picture, everything on the device, and with components brought there one by one."""
    plan, found = bench.sizes.largest, {}

    def peak(mode: str) -> dict[str, Any]:
        bench.need(15)
        made: dict[str, Any] = {}
        with drawing(pipe, mode):
            draw(bench, pipe, plan, 1, {}, 0)
            with bench.peak(made):
                draw(bench, pipe, plan, 1, {}, 1)
        return made

    fast = ("kernels", "graphs") if bench.cuda else ("eager", "graphs without kernels")
    for mode in fast:
        found[f"everything on the device, {mode}"] = bench.attempt(partial(peak, mode))
    pipe.enable_vae_tiling(plan.height // 2)
    found[f"everything on the device, {fast[0]}, exact tiles"] = bench.attempt(partial(peak, fast[0]))
    pipe.enable_model_cpu_offload(device=bench.device)
    found[f"components one by one, {fast[0]}, exact tiles"] = bench.attempt(partial(peak, fast[0]))
    pipe.disable_vae_tiling()
    found[f"components one by one, {fast[0]}"] = bench.attempt(partial(peak, fast[0]))
    return found
