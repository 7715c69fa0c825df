"""Names of published checkpoints and what they are called here, as tables of (pattern, replacement)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# block i of the original is `blocks.i`, `unregistered_blocks.i` or module j of chunk c; the table knows the first form
_CHUNK = re.compile(r"^block_chunks\.(\d+)\.module\.(\d+)\.")
_FLAT = re.compile(r"^(?:unregistered_)?blocks\.(\d+)\.")

_INFINITY: tuple[tuple[str, str], ...] = (
    (r"text_norm\.weight", "text_norm.weight"),
    (r"text_proj_for_sos\.ca\.mat_q", "text_pool.query"),
    (r"text_proj_for_sos\.ca\.mat_kv\.weight", "text_pool.kv.weight"),
    (r"text_proj_for_sos\.ca\.(v_bias|proj\.weight|proj\.bias)", r"text_pool.\1"),
    (r"text_proj_for_ca\.(0|2)\.(weight|bias)", r"text_proj.\1.\2"),
    (r"cfg_uncond", "null_text"),
    (r"pos_start", "first_position"),
    (r"lvl_embed\.weight", "level_embed.weight"),
    (r"word_embed\.(weight|bias)", r"code_embed.\1"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_modulation.\1"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head_modulation.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
    (r"blocks\.(\d+)\.ada_gss", r"blocks.\1.modulation"),
    (r"blocks\.(\d+)\.sa\.scale_mul_1H11", r"blocks.\1.attn.log_scale"),
    (r"blocks\.(\d+)\.sa\.mat_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"blocks\.(\d+)\.sa\.(q_bias|v_bias|proj\.weight|proj\.bias)", r"blocks.\1.attn.\2"),
    (r"blocks\.(\d+)\.ca\.mat_q\.(weight|bias)", r"blocks.\1.cross.q.\2"),
    (r"blocks\.(\d+)\.ca\.mat_kv\.weight", r"blocks.\1.cross.kv.weight"),
    (r"blocks\.(\d+)\.ca\.(v_bias|proj\.weight|proj\.bias)", r"blocks.\1.cross.\2"),
    (r"blocks\.(\d+)\.ca_norm\.(weight|bias)", r"blocks.\1.cross_norm.\2"),
    (r"blocks\.(\d+)\.ffn\.(fc1|fc2)\.(weight|bias)", r"blocks.\1.ffn.\2.\3"),
)
# buffers of constant zeros: keys have no bias
_DROPPED = re.compile(r"(?:.*\.)?zero_k_bias")

# convolutions and norms are wrapped there, which puts `.conv` and `.norm` into names; files without that exist too
_END = r"\.(weight|bias)"
_BSQ: tuple[tuple[str, str], ...] = (
    (rf"(encoder|decoder)\.(conv_in|conv_out)(?:\.conv)?{_END}", r"\1.\2.\3"),
    (rf"(encoder|decoder)\.norm_out(?:\.norm)?{_END}", r"\1.norm_out.\2"),
    (rf"(encoder|decoder)\.mid\.(block_[12]\.conv[12])(?:\.conv)?{_END}", r"\1.mid.\2.\3"),
    (rf"(encoder|decoder)\.mid\.(block_[12]\.norm[12])(?:\.norm)?{_END}", r"\1.mid.\2.\3"),
    (rf"(encoder\.down|decoder\.up)\.(\d+\.block\.\d+)\.(conv[12]|nin_shortcut)(?:\.conv)?{_END}", r"\1.\2.\3.\4"),
    (rf"(encoder\.down|decoder\.up)\.(\d+\.block\.\d+)\.(norm[12])(?:\.norm)?{_END}", r"\1.\2.\3.\4"),
    (rf"(encoder\.down\.\d+\.downsample|decoder\.up\.\d+\.upsample)\.conv(?:\.conv)?{_END}", r"\1.conv.\2"),
)
# powers of two of the quantiser, stored under both of its names
_BSQ_DROPPED = re.compile(r"quantizer?\.lfq\.mask")


class UnknownTensor(ValueError):
    """A name that no table knows."""


@dataclass(frozen=True)
class Renamed:
    """Weights under our names, the official name of each, and official names that no table knows."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    official: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)


def rename(official: Mapping[str, Tensor], key: Callable[[str], str | None]) -> Renamed:
    """Every tensor under the name that `key` gives it; None drops it."""
    renamed = Renamed()
    for name, tensor in official.items():
        try:
            ours = key(name)
        except UnknownTensor:
            renamed.left_over.append(name)
            continue
        if ours in renamed.weights:
            raise ValueError(f"tensors {renamed.official[ours]!r} and {name!r} are the same weight; remove one of them")
        if ours is not None:
            renamed.weights[ours], renamed.official[ours] = tensor, name
    return renamed


def infinity_key(name: str, blocks_per_chunk: int | None = None) -> str | None:
    """Our name of an official Infinity tensor, None if we do not need it; chunked names need the chunk size."""
    if _DROPPED.fullmatch(name):
        return None
    if match := _CHUNK.match(name):
        if blocks_per_chunk is None:
            raise ValueError(f"tensor {name!r} counts blocks within a chunk; pass blocks_per_chunk")
        name = f"blocks.{int(match[1]) * blocks_per_chunk + int(match[2])}.{name[match.end() :]}"
    elif match := _FLAT.match(name):
        name = f"blocks.{match[1]}.{name[match.end() :]}"
    return _look_up(name, _INFINITY, "an Infinity transformer")


def bsq_key(name: str) -> str | None:
    """Our name of a tensor of an official bitwise tokenizer, None if we do not need it."""
    return None if _BSQ_DROPPED.fullmatch(name) else _look_up(name, _BSQ, "a bitwise tokenizer")


def _look_up(name: str, table: tuple[tuple[str, str], ...], what: str) -> str:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise UnknownTensor(f"tensor {name!r} is not part of {what}; is this another kind of checkpoint?")


def chunk_size(names: Iterable[str]) -> int:
    """How many blocks a chunk of these official names holds; 1 for a flat layout."""
    return 1 + max((int(match[2]) for name in names if (match := _CHUNK.match(name))), default=0)


def infinity_weights(official: Mapping[str, Tensor]) -> Renamed:
    """An official state dict under our names; the per-head scale, (1, H, 1, 1) or (1, 1, H, 1), becomes (H,)."""
    size = chunk_size(official)
    renamed = rename(official, lambda name: infinity_key(name, size))
    for name, tensor in renamed.weights.items():
        if name.endswith("log_scale") and tensor.numel() == max(tensor.shape, default=1):
            renamed.weights[name] = tensor.flatten()  # (H,)
    return renamed


def infinity_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `infinity_weights`, where nothing may be left over."""
    renamed = infinity_weights(official)
    if renamed.left_over:
        raise UnknownTensor(f"tensors {', '.join(renamed.left_over)} are not part of an Infinity transformer")
    return renamed.weights
