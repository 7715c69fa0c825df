"""Random tiny checkpoints laid out as the published ones, from their recorded lists of names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import TEXT_WIDTH, tiny_backbone
from tiny_pipeline import WORDS, tiny_tokenizer
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from scaleweaver.backbones.infinity import InfinityTransformer
from scaleweaver.convert.keymap import bsq_key, infinity_key
from scaleweaver.tokenizers.bsq import BSQTokenizer

GOLDEN = Path(__file__).parent / "golden"
BITS = 8


def shapes(name: str) -> dict[str, list[int]]:
    """Published tensor names and shapes of a key list."""
    return {key: shape for key, (_, shape) in json.loads((GOLDEN / f"{name}_keys.json").read_text())["tensors"].items()}


def tiny_infinity(**config: Any) -> InfinityTransformer:
    """A random transformer that goes with `tiny_bsq` and `write_text_encoder`."""
    return tiny_backbone(**{"depth": 4, "bits": BITS, "text_length": 512, **config})


def tiny_bsq(seed: int = 0, **config: Any) -> BSQTokenizer:
    """A random tokenizer of stride 16 with the published numbers of blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BSQTokenizer(**{"bits": BITS, "widths": (8, 16, 16, 16, 16), **config}).eval()


def official_transformer(
    model: InfinityTransformer, *, per_chunk: int | None = 2, heads_last: bool = False
) -> dict[str, Tensor]:
    """The model's weights under the published names: blocks in chunks or (None) flat, buffers of zeros included."""
    weights = model.state_dict()
    names = [name for name in shapes("infinity_125m") if not re.match(r"block_chunks\.(?!0\.module\.0\.)", name)]
    official: dict[str, Tensor] = {}
    for name in names:
        block = name.removeprefix("block_chunks.0.module.0.")
        for layer in range(len(model.blocks)) if block != name else [None]:
            if layer is None:
                there = name
            elif per_chunk is None:
                there = f"blocks.{layer}.{block}"
            else:
                there = f"block_chunks.{layer // per_chunk}.module.{layer % per_chunk}.{block}"
            ours = infinity_key(name if layer is None else f"blocks.{layer}.{block}")
            if ours is None:
                official[there] = torch.zeros(model.config["width"])
            elif ours.endswith("log_scale"):
                official[there] = weights[ours].view((1, 1, -1, 1) if heads_last else (1, -1, 1, 1))
            else:
                official[there] = weights[ours]
    return official


def official_tokenizer(vae: BSQTokenizer, *, plain: bool = False, names: str = "infinity_vae_d16") -> dict[str, Tensor]:
    """The weights under the published names, or those without the inner `.conv` and `.norm`; with both mask aliases."""
    weights, bits = vae.state_dict(), vae.config["bits"]
    official: dict[str, Tensor] = {}
    for name in shapes(names):
        ours = bsq_key(name)
        if ours is None:
            official[name] = 2 ** torch.arange(bits - 1, -1, -1)
        elif ours in weights:
            official[ours if plain else name] = weights[ours]
    # a change of width lies elsewhere in a tiny network
    for ours in weights.keys() - {bsq_key(name) for name in official}:
        official[ours if plain else re.sub(r"\.(weight|bias)$", r".conv.\1", ours)] = weights[ours]
    return official


def write_sharded(folder: Path, weights: Mapping[str, Tensor], kind: str, shards: int = 3) -> Path:
    """A folder of shards with an index, as the 8B model is published."""
    from safetensors.torch import save_file

    save: Callable[..., None] = save_file if kind == "safetensors" else torch.save
    folder.mkdir()
    where: dict[str, str] = {}
    names = list(weights)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.{kind}"
        # safetensors wants no shared memory
        part = {name: weights[name].clone() for name in names[number::shards]}
        save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": where}
    (folder / f"model.{kind}.index.json").write_text(json.dumps(index))
    return folder


def write_text_encoder(folder: Path, width: int = TEXT_WIDTH) -> Path:
    """A random T5 encoder and its tokenizer in one folder, as on the Hub."""
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
