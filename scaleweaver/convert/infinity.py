"""Published Infinity models (arXiv 2412.04431) to a folder that `VARControlPipeline.from_pretrained` reads.

Sizes are read from the shapes of the tensors, so one function serves the 125M, 2B and 8B models, the sizes of the
scaling study and what a training run has saved. Weights are mapped from disk and written shard by shard.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from scaleweaver.backbones.infinity import PRESETS, InfinityTransformer
from scaleweaver.convert.fill import Sizes, fill, read_sizes
from scaleweaver.convert.keymap import bsq_key, infinity_weights, rename
from scaleweaver.convert.read import read_weights
from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.precision import read_dtype
from scaleweaver.schedule import BUDGETS
from scaleweaver.tokenizers.bsq import PRESETS as TOKENIZERS
from scaleweaver.tokenizers.bsq import BSQTokenizer

logger = logging.getLogger(__name__)

_TOKEN_STRIDE = 16  # pixels per transformer token and axis in all published schedules
_SAMPLING = {"guidance_scale": 3.0, "temperature": 0.5, "top_k": 900, "top_p": 0.97}
# preset -> pixel budget and the call defaults that differ, as in the published scripts
_DEFAULTS: dict[str, tuple[str, dict[str, float]]] = {
    "125M": ("0.06M", {"guidance_scale": 4.0}),
    "2B": ("1M", {}),
    "8B": ("1M", {"temperature": 1.0}),
}

_TRANSFORMER_SIZES: Sizes = {
    "width": ("first_position", 3, 2),
    "heads": ("blocks.0.attn.log_scale", 1, 0),
    "bits": ("code_embed.weight", 2, 1),
    "text_width": ("text_norm.weight", 1, 0),
    "ffn_hidden": ("blocks.0.ffn.fc1.weight", 2, 0),
    "pool_heads": ("text_pool.query", 3, 1),
    "max_scales": ("level_embed.weight", 2, 0),
}


def convert_infinity(
    *,
    transformer: str | os.PathLike[str],
    vae: str | os.PathLike[str],
    text_encoder: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    budget: str | None = None,
    text_length: int = 512,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the folder `out` of a whole pipeline; returns it.

    transformer: a .pth or .safetensors file, a checkpoint of a training run, or the folder of a sharded one. vae: the
    tokenizer it was trained with. text_encoder: a folder or Hub id of the T5 encoder; None leaves it out, and prompts
    then come as `prompt_embeds`. dtype: number format to save in, by default that of the files. budget: default
    picture size, "0.06M" to "1M" pixels, by default what the model was published for. text_length: longest prompt.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not an empty folder; pass a new one")
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"budget {budget!r} is unknown; pass one of {', '.join(BUDGETS)}")
    precision = None if dtype is None else read_dtype(dtype)

    # all that can be wrong shows before anything is written
    backbone = load_transformer(transformer, text_length)
    tokenizer = load_tokenizer(vae, backbone.config["bits"])
    text: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if text_encoder is not None:
        text = load_text_encoder(text_encoder, backbone.config["text_width"], precision)
    if precision is not None:
        _cast(backbone, precision)
        _cast(tokenizer, precision)
    pipe = VARControlPipeline(backbone, tokenizer, **text, **_defaults(backbone, Path(transformer).name, budget))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        written = Path(work) / out.name  # a conversion that is stopped leaves no half of a model
        pipe.save_pretrained(written, max_shard_size=max_shard_size)
        if out.is_dir():
            out.rmdir()
        written.rename(out)
    return out


def load_transformer(path: str | os.PathLike[str], text_length: int = 512) -> InfinityTransformer:
    """A published transformer, its weights mapped from disk."""
    return fill_transformer(read_weights(path, inside=("trainer.gpt_fsdp",)), os.fspath(path), text_length)


def fill_transformer(official: Mapping[str, Tensor], source: str, text_length: int = 512) -> InfinityTransformer:
    """The transformer of an official state dict; ValueError names every weight that is missing, wrong or left over."""
    renamed = infinity_weights(official)
    sizes = read_sizes(renamed.weights, _TRANSFORMER_SIZES)
    table = renamed.weights.get("null_text")
    if table is not None and table.ndim == 2 and len(table) != text_length:
        renamed.weights["null_text"] = _fit_table(table, text_length, source)
    config = {**sizes, "depth": max(1, _count(renamed.weights, r"blocks\.(\d+)\.")), "text_length": text_length}
    sized = sizes.keys() == _TRANSFORMER_SIZES.keys()
    if not sized:  # the names of the weights do not depend on sizes
        config = {"depth": config["depth"]}
    model = fill(lambda: InfinityTransformer(**config), renamed, source, sized=sized)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info("%s: %s transformer, %.1fM, %s", source, _preset(model) or "unpublished", millions, config)
    return model


def load_tokenizer(path: str | os.PathLike[str], token_bits: int) -> BSQTokenizer:
    """A published tokenizer, its weights mapped from disk, for a transformer with `token_bits` bits per token."""
    return fill_tokenizer(read_weights(path, inside=("vae",)), os.fspath(path), token_bits)


def fill_tokenizer(official: Mapping[str, Tensor], source: str, token_bits: int) -> BSQTokenizer:
    """The tokenizer of an official state dict; ValueError names every weight that is missing, wrong or left over."""
    renamed = rename(official, bsq_key)
    levels = max(1, _count(renamed.weights, r"encoder\.down\.(\d+)\."))
    table = {f"{i}": (f"encoder.down.{i}.block.0.conv1.weight", 4, 0) for i in range(levels)}
    table |= {"bits": ("encoder.conv_out.weight", 4, 0), "stem_width": ("encoder.conv_in.weight", 4, 0)}
    sizes = read_sizes(renamed.weights, table)
    sized = sizes.keys() == table.keys()
    widths = tuple(sizes.get(f"{i}", 128) for i in range(levels))
    bits, stride, stem = sizes.get("bits", 16), 2 ** (levels - 1), sizes.get("stem_width")
    patch = _TOKEN_STRIDE // stride
    config: dict[str, Any] = {
        "bits": bits,
        "stride": stride,
        "widths": widths,
        "patch": patch,
        "encoder_blocks": max(1, _count(renamed.weights, r"encoder\.down\.0\.block\.(\d+)\.")),
        "decoder_blocks": max(1, _count(renamed.weights, r"decoder\.up\.0\.block\.(\d+)\.")),
        "stem_width": None if stem == widths[0] else stem,
    }
    tokenizer = fill(lambda: BSQTokenizer(**config), renamed, source, sized=sized)
    if bits * patch**2 != token_bits:
        raise ValueError(
            f"the tokenizer {source} has {bits} bits at stride {stride}, which makes {bits * patch**2} per token of "
            f"{_TOKEN_STRIDE} pixels, and the transformer reads {token_bits}; pass the tokenizer it was trained with "
            "(125M: d16, 2B: d32reg, 8B: d56_f8_14_patchify)"
        )
    logger.info("%s: %s tokenizer, %s", source, _tokenizer_preset(tokenizer) or "unpublished", config)
    return tokenizer


def load_text_encoder(source: str | os.PathLike[str], width: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """T5 encoder and its tokenizer from a folder or the Hub; the encoder half alone of a complete T5."""
    name = os.fspath(source)
    try:
        found = T5Config.from_pretrained(name).d_model
        if found == width:
            tokenizer = AutoTokenizer.from_pretrained(name)
            loaded: Any = T5EncoderModel.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the text encoder {name!r} could not be loaded ({str(error).splitlines()[0]}); pass a folder that holds "
            "encoder and tokenizer, or a Hub id while online"
        ) from error
    if found != width:
        raise ValueError(
            f"the text encoder {name!r} is {found} wide and the transformer reads {width}; pass the one it was trained "
            "with (google/flan-t5-xl for the published models)"
        )
    encoder, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the text encoder {name!r} lacks {', '.join(missing[:20])} ({len(missing)} in all)")
    return {"text_encoder": encoder.eval().requires_grad_(False), "tokenizer": tokenizer}


def _fit_table(table: Tensor, length: int, source: str) -> Tensor:
    """The unconditional text (rows, T) with `length` rows: cropped, or padded with initial rows."""
    rows, width = table.shape
    if rows > length:
        logger.warning("%s: cfg_uncond has %d rows, the first %d are kept", source, rows, length)
        return table[:length]
    logger.warning(
        "%s: cfg_uncond has %d rows, random initial ones make it %d; prompts above %d tokens are guided by those",
        source, rows, length, rows,
    )  # fmt: skip
    # as the network starts, and the same at every conversion
    rest = torch.randn(length - rows, width, generator=torch.Generator().manual_seed(0)) / math.sqrt(width)
    return torch.cat([table, rest.to(table)])  # (length, T)


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number the pattern finds, but no more than there are names: files may hold anything."""
    numbers = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return min(max(numbers, default=-1) + 1, len(names))


def _preset(model: InfinityTransformer) -> str | None:
    fitting = (name for name, sizes in PRESETS.items() if all(model.config[key] == size for key, size in sizes.items()))
    return next(fitting, None)


def _tokenizer_preset(tokenizer: BSQTokenizer) -> str | None:
    def public(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if not key.startswith("_")}

    with torch.device("meta"):
        known = {name: public(BSQTokenizer.preset(name).config) for name in TOKENIZERS}
    return next((name for name, config in known.items() if config == public(tokenizer.config)), None)


def _defaults(model: InfinityTransformer, name: str, budget: str | None) -> dict[str, Any]:
    """Schedule and sampling of a published size; those of the 2B at 256x256 for any other."""
    published, changes = _DEFAULTS.get(_preset(model) or "", ("0.06M", {}))
    if budget is None:
        # the two 8B models have the same shapes
        budget = "0.25M" if "512x512" in name and published == "1M" else published
        if budget != published or _preset(model) not in _DEFAULTS:
            logger.warning("%s: default pictures of %s pixels; budget= chooses another size", name, budget)
    return {**_SAMPLING, **changes, "schedule": {"family": "infinity", "budget": budget}}


@torch.no_grad()
def _cast(model: InfinityTransformer | BSQTokenizer, dtype: torch.dtype) -> None:
    """Weights to another number format, but those that the class keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.to(torch.float32 if kept & set(name.split(".")) else dtype)
