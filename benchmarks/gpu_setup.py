"""What the parts of gpu.py share: sizes, clocks, random networks of these sizes, and the errors of one attempt."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from infinity_125m_cpu import PROMPT, tokenizer_of
from torch import nn
from transformers import T5Config, T5EncoderModel

from scaleweaver.adapters import add_control
from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.doctor import processor
from scaleweaver.methods.scaleweaver import ScaleWeaverConfig
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.schedule import ScaleSchedule, infinity_schedule
from scaleweaver.tokenizers.bsq import BSQTokenizer

PACKAGES = ("scaleweaver", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy")
CONTROLS = ("canny", "depth")


@dataclass(frozen=True)
class Sizes:
    """What is measured: the published 2B with flan-t5-xl and the d32 tokenizer, or something tiny to try the script."""

    backbone: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    schedules: dict[str, ScaleSchedule]  # by side in pixels
    dtype: torch.dtype
    batches: tuple[int, ...]
    copied: int  # bytes of the copy that measures bandwidth
    product: int  # side of the matrices whose product measures the other ceiling
    checked: tuple[int, ...]  # numbers of tokens at which kernels are compared with float64
    repeats: int
    tests: tuple[str, ...]  # of the repository, run natively

    @property
    def heads(self) -> int:
        return int(self.backbone["heads"])

    @property
    def width(self) -> int:
        return int(self.backbone["width"])

    @property
    def largest(self) -> ScaleSchedule:
        return list(self.schedules.values())[-1]


def full(quick: bool) -> Sizes:
    budgets = {"256": "0.06M", "1024": "1M"} if quick else {"256": "0.06M", "512": "0.25M", "1024": "1M"}
    return Sizes(
        backbone={"depth": 32, "width": 2048, "heads": 16, "bits": 32},
        vae={"bits": 32},
        text={"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24,
              "feed_forward_proj": "gated-gelu"},
        schedules={side: infinity_schedule("1.0", budget) for side, budget in budgets.items()},
        dtype=torch.bfloat16,
        batches=(1,) if quick else (1, 8),
        copied=2**30,
        product=8192,
        checked=(1, 21, 521, 2521),
        repeats=3 if quick else 5,
        tests=("tests/kernels", "tests/test_graphs.py"),
    )  # fmt: skip


def tiny() -> Sizes:
    grids = ((1, 1), (2, 2), (3, 3))
    return Sizes(
        backbone={"depth": 1, "width": 64, "heads": 2, "bits": 16, "text_width": 32, "text_length": 64},
        vae={"bits": 4, "stride": 4, "widths": (8, 8, 8), "patch": 2, "decoder_blocks": 1, "encoder_blocks": 1},
        text={"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1},
        schedules={"16": ScaleSchedule(grids[:2], (3, 3), 8), "24": ScaleSchedule(grids, (3, 3), 8)},
        dtype=torch.float32,
        batches=(1, 2),
        copied=2**20,
        product=64,
        checked=(5,),
        repeats=1,
        tests=("tests/kernels/test_key_ranges.py",),
    )


class OutOfTime(RuntimeError):
    """The minutes that were given are used up."""


@dataclass
class Bench:
    """The device, the sizes, the minutes left, and the report that grows."""

    device: torch.device
    sizes: Sizes
    minutes: float
    report: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.minutes * 60 - (time.perf_counter() - self.started)

    def need(self, seconds: float) -> None:
        """Stop here, before something that takes so long, if there is less time left."""
        if self.left() < seconds:
            raise OutOfTime(f"{self.left():.0f} s left of {self.minutes:g} minutes, {seconds:.0f} needed")

    def attempt(self, run: Callable[[], Any]) -> Any:
        """The result, or {"error": ...} with the end of the traceback: one thing that fails must not end the rest."""
        try:
            return run()
        except KeyboardInterrupt:
            raise
        except OutOfTime as error:
            return {"skipped": str(error)}
        except BaseException as error:  # a library may exit
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            found["where"] = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            found |= {"device": "lost"} if self.lost() else {}
            return found

    def lost(self) -> bool:
        """Whether the device refuses this process, as after a kernel that wrote where it must not."""
        try:
            self.synchronize()
            if self.cuda:
                torch.cuda.empty_cache()
        except RuntimeError:
            return True
        return False

    def ceiling(self, name: str) -> float:
        """What the part `ceilings` has found out about the device."""
        found = self.report["ceilings"]
        if name not in found:
            raise RuntimeError(f"{name} is not known, ceilings gave {found}; run that part again")
        return float(found[name])

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any], budget: float = 100.0) -> float:
        """Median of repeated calls within about `budget` milliseconds, the GPU's cache emptied between them; elsewhere
        that of the second call.
        """
        run()
        if self.cuda:
            from triton.testing import do_bench

            return float(do_bench(run, warmup=25, rep=int(budget), return_mode="median"))
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1000

    def milliseconds_launched(self, run: Callable[[], Any], budget: float = 50.0) -> float:
        """The same without the host's share: replayed from a graph, as in a picture that is."""
        if not self.cuda:
            return self.milliseconds(run, budget)
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(run, rep=int(budget), return_mode="median"))

    @contextmanager
    def peak(self, into: dict[str, Any], name: str = "peak_mib") -> Iterator[None]:
        """The most memory allocated within, MiB; nothing where no allocator counts it."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        into[name] = round(torch.cuda.max_memory_allocated() / 2**20) if self.cuda else None

    @cached_property
    def machine(self) -> dict[str, Any]:
        """The device and the versions of all that matters."""
        versions = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = "absent"
        if not self.cuda:
            return {"device": processor(), "versions": versions}
        found = torch.cuda.get_device_properties(self.device)
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        return {
            "device": found.name, "memory_mib": found.total_memory // 2**20, "versions": versions,
            "multiprocessors": found.multi_processor_count, "capability": [found.major, found.minor],
        }  # fmt: skip

    def random(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> torch.Tensor:
        """Normal numbers; never zeros, which run faster and hide mistakes."""
        generator = torch.Generator(self.device).manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.sizes.dtype)


def backbone(bench: Bench) -> InfinityTransformer:
    """Random weights in the sizes' format, but for the parts that loading leaves in float32."""
    with bench.device:
        made = InfinityTransformer(**bench.sizes.backbone)
    kept = InfinityTransformer._keep_in_fp32_modules
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not set(name.split(".")) & set(kept):
                parameter.data = parameter.data.to(bench.sizes.dtype)
            if name.endswith("modulation"):  # fresh gates let nothing through
                parameter.normal_(std=0.3)
    return made.eval().requires_grad_(False)


def pipeline(bench: Bench) -> VARControlPipeline:
    """The whole model, with two random controls of the default form."""
    with bench.device:
        vae = BSQTokenizer(**bench.sizes.vae)
        text = T5EncoderModel(T5Config(**bench.sizes.text))
    pipe = VARControlPipeline(
        transformer=backbone(bench),
        vae=vae.to(bench.sizes.dtype).eval(),
        text_encoder=text.to(bench.sizes.dtype).eval(),
        tokenizer=tokenizer_of(PROMPT),
        schedule=bench.sizes.largest.to_dict(),
        temperature=1.0,
        top_p=0.97,
    )
    for name in CONTROLS:
        adapter = add_control(pipe.transformer, ScaleWeaverConfig(kind=name), name)
        for layer in adapter.z.values():
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        pipe.controls[name] = adapter.requires_grad_(False)
    pipe.to(bench.device)
    if bench.cuda:
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe
