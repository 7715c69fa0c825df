"""Throughput and waiting times of the server, in batches and one by one, and how far rounding moves logits.

python benchmarks/serve.py --threads 2 --into benchmarks/results/serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai import AsyncOpenAI

from scaleweaver.commands.loading import load_pipeline
from scaleweaver.doctor import processor
from scaleweaver.sampling import BitwiseSampler
from scaleweaver.serve.exact import measured_rounding
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.server import running

PROMPTS = [
    "a large red rocket on grass at noon",
    "a small blue car on sand",
    "a glossy red mushroom on stone at dawn",
    "two green cubes",
    "a yellow ball left of a purple cone on snow at night",
    "a person in a red shirt waving",
]
# name -> options of the server
MODES: dict[str, dict[str, Any]] = {
    "one by one": {"max_batch": 1},
    "batches, exact": {"max_batch": 8, "exact": True},
    "batches, not exact": {"max_batch": 8, "exact": False},
}


async def load(url: str, clients: int, seconds: float) -> tuple[list[float], float]:
    """Each client asks for one picture after the other: how long each took, and all together."""
    waits: list[float] = []
    started = time.perf_counter()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:

        async def one(client: int) -> None:
            number = 0
            while time.perf_counter() - started < seconds:
                begun = time.perf_counter()
                prompt, seed = PROMPTS[(client + number) % len(PROMPTS)], 1000 * client + number
                await api.images.generate(prompt=prompt, extra_body={"seed": seed})
                waits.append(time.perf_counter() - begun)
                number += 1

        await asyncio.gather(*(one(client) for client in range(clients)))
    return waits, time.perf_counter() - started


class Recorder(BitwiseSampler):
    """A sampler that keeps the logits that it gets, in `seen`."""

    seen: list[torch.Tensor]

    def sample(self, logits: torch.Tensor, step: Any, generators: Sequence[torch.Generator]) -> torch.Tensor:
        self.seen.append(logits.clone())
        return super().sample(logits, step, generators)


def rounding(pipe: Any, pictures: int) -> dict[str, Any]:
    """Differences of guided logits between a batch and each picture alone, up to the first bit that differs."""

    def draw(prompts: list[str], seeds: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        recorder = Recorder(*(pipe.config[name] for name in ("temperature", "top_k", "top_p")))
        object.__setattr__(recorder, "seen", [])
        return recorder.seen, pipe(prompts, seed=seeds, sampler=recorder, output_type="latent").codes

    prompts, seeds = [PROMPTS[i % len(PROMPTS)] for i in range(pictures)], list(range(pictures))
    together, codes = draw(prompts, seeds)
    found, turned = [], 0
    for row in range(pictures):
        alone, own = draw([prompts[row]], [seeds[row]])
        for scale, logits in enumerate(alone):
            found.append((together[scale][row] - logits[0]).abs().flatten())
            if not torch.equal(codes[scale][row], own[scale][0]):
                turned += 1
                break
    moved = torch.cat(found).float().cpu().numpy()
    names = {"median": 0.5, "99%": 0.99, "99.99%": 0.9999, "most": 1.0}
    return {
        "pictures": pictures,
        "turned_by_rounding": turned,
        "moved_logits": {name: float(np.quantile(moved, share)) for name, share in names.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounding", type=float, help="of exact batches; default: as the server has it")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each mode")
    parser.add_argument("--pictures", type=int, default=24, help="of the rounding's measure")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    pipe = load_pipeline(options.model, options.device, options.dtype, threads=options.threads)
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS[0], seed=0)

    modes = {}
    for mode, settings in MODES.items():
        exact = {"rounding": options.rounding} if settings.get("exact", True) else {}
        with running(pipe, ServeOptions(queue=max(64, options.clients), **settings, **exact)) as url:
            waits, seconds = asyncio.run(load(url, options.clients, options.seconds))
        modes[mode] = {
            "pictures": len(waits),
            "pictures_per_second": round(len(waits) / seconds, 3),
            "wait_seconds": {f"{share}%": round(float(np.percentile(waits, share)), 3) for share in (50, 90, 99)},
        }
        print(mode, json.dumps(modes[mode]))
    name = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else processor()
    report = {
        "machine": {"processor": name, "threads": options.threads, "torch": torch.__version__},
        "model": options.model,
        "dtype": options.dtype,
        "clients": options.clients,
        "modes": modes,
        "rounding": {**rounding(pipe, options.pictures), "tolerance": options.rounding or measured_rounding(pipe)},
    }
    print(json.dumps(report["rounding"]))
    if options.into:
        options.into.parent.mkdir(parents=True, exist_ok=True)
        options.into.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
