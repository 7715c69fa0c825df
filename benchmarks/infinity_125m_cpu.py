"""One picture of 256x256 with the published 125M architecture on a CPU: seconds per stage and peak memory.

Real sizes, random weights: the 125M transformer, the d16 tokenizer, and a T5 encoder as wide as flan-t5-xl (2048) but
with 2 of its 24 layers, so the text stage is not that of the published model; the other stages are.

python benchmarks/infinity_125m_cpu.py [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.doctor import processor
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.tokenizers.bsq import BSQTokenizer

PROMPT = "a small stone house beside a frozen lake under a sky full of stars , photographed from a hill at night"
TEXT_LAYERS = 2
PACKAGES = ("scaleweaver", "torch", "transformers", "diffusers")
LIMIT_MIB = 4096
RESULT = Path(__file__).parent / "results" / "infinity_125m_cpu.json"


def tokenizer_of(prompt: str) -> PreTrainedTokenizerFast:
    """One token a word of this prompt: the vocabulary changes no cost."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(prompt.split())]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build() -> VARControlPipeline:
    """The pipeline with the published sizes and call defaults."""
    text = T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_heads=32, num_layers=TEXT_LAYERS,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    pipe = VARControlPipeline(
        transformer=InfinityTransformer.preset("125M").eval(),
        vae=BSQTokenizer.preset("d16").eval(),
        text_encoder=T5EncoderModel(text).eval(),
        tokenizer=tokenizer_of(PROMPT),
        schedule={"family": "infinity", "budget": "0.06M"},
        guidance_scale=4.0,
        temperature=0.5,
        top_k=900,
        top_p=0.97,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    stages: list[dict[str, Any]] = [{"stage": "imports", "peak_rss_mib": round(peak_mib())}]
    last = time.perf_counter(), time.process_time()

    def finished(stage: str) -> None:
        nonlocal last
        now = time.perf_counter(), time.process_time()
        # other load on the machine lengthens the first number only
        seconds, cpu = (round(b - a, 3) for a, b in zip(last, now, strict=True))
        stages.append({"stage": stage, "seconds": seconds, "cpu_seconds": cpu, "peak_rss_mib": round(peak_mib())})
        last = now

    def after_scale(pipe: VARControlPipeline, index: int, step: Any, values: dict[str, Any]) -> None:
        finished(f"scale {index + 1}, {step.h}x{step.w}" + ", with text keys and values" * (index == 0))

    pipe = build()
    finished("building with random weights")
    text = pipe.encode_prompt(PROMPT)
    finished(f"prompt of {text.lengths[0]} tokens ({TEXT_LAYERS} of 24 T5 layers)")
    drawn: Any = pipe(prompt_embeds=text, seed=7, output_type="latent", callback_on_step_end=after_scale)
    finished("rest of the call")
    (image,) = pipe.preview(drawn.latent)
    finished("decoding")

    # what a picture takes once the model is there
    total, cpu = (round(sum(entry[kind] for entry in stages[2:]), 3) for kind in ("seconds", "cpu_seconds"))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "threads": arguments.threads, "dtype": "float32", "picture": list(image.size), "guidance_scale": 4.0,
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters())
            for name in ("transformer", "vae", "text_encoder")
        },
        "runs": 1, "stages": stages, "seconds_per_picture": total, "cpu_seconds_per_picture": cpu,
        "peak_rss_mib": round(peak_mib()),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    print(f"{processor()}, {arguments.threads} threads, float32, one run, random weights")
    print()
    print("| stage | seconds | CPU seconds | peak RSS so far, MiB |")
    print("|---|---|---|---|")
    for entry in stages:
        print(
            f"| {entry['stage']} | {entry.get('seconds', '')} | {entry.get('cpu_seconds', '')} | "
            f"{entry['peak_rss_mib']} |"
        )
    print(f"| one picture | {total} | {cpu} | {peak_mib():.0f} |")
    if peak_mib() > LIMIT_MIB:
        raise SystemExit(f"peak memory is above the {LIMIT_MIB} MiB that this size is meant to stay under")


if __name__ == "__main__":
    main()
