"""Names of published checkpoints and what they are called here, as tables of (pattern, replacement)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
    for pattern, replacement in _INFINITY:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise ValueError(f"tensor {name!r} is not part of an Infinity transformer; is this another kind of checkpoint?")


def chunk_size(names: Iterable[str]) -> int:
    """How many blocks a chunk of these official names holds; 1 for a flat layout."""
    return 1 + max((int(match[2]) for name in names if (match := _CHUNK.match(name))), default=0)


def infinity_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names; the per-head scale, (1, H, 1, 1) or (1, 1, H, 1), becomes (H,)."""
    size = chunk_size(official)
    ours = {}
    for name, tensor in official.items():
        if (key := infinity_key(name, size)) is not None:
            ours[key] = tensor.flatten() if key.endswith("log_scale") else tensor
    return ours
