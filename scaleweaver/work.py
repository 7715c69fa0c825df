"""Operations and bytes of the parts of a network: by formula from their shapes, or on copies that have no memory.

A floating-point operation is one multiplication or one addition; only those of matrix products, convolutions and
attention count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaleweaver.contracts import TextContext
from scaleweaver.evaluate.memory import dry_peak_bytes, without_storage
from scaleweaver.kernels.interval_attention import computed_pairs
from scaleweaver.kernels.key_ranges import KeyRanges
from scaleweaver.methods.scaleweaver import ControlAdapter
from scaleweaver.reference import reference_ranges
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.tokenizers.autoencoder import Upsample


def products(layer: Any, name: str | None = None) -> int:
    """Operations of a linear layer per token, with the LoRA `name` or with those that are on."""
    if not isinstance(layer, LoraLayer):
        return 2 * int(layer.in_features) * int(layer.out_features)
    base: Any = layer.base_layer
    reads, writes = int(base.in_features), int(base.out_features)
    on = [name] if name else [] if layer.disable_adapters else layer.active_adapters
    ranks = sum(int(layer.r[one]) for one in on if one in layer.lora_A)
    return 2 * reads * writes + 2 * ranks * (reads + writes)


def pairs(ranges: KeyRanges | None, queries: int, keys: int) -> int:
    """Products of a query and a key; `ranges` None: everything is seen."""
    return queries * keys if ranges is None else computed_pairs(ranges, keys)


def block_flops(block: Any) -> int:
    """Linear layers of a block, per token."""
    layers = (block.attn.qkv, block.attn.proj, block.ffn.fc1, block.ffn.fc2, block.cross.q, block.cross.proj)
    return sum(map(products, layers))


def head_flops(network: Any, *, rows: int, tokens: int) -> int:
    classes = 1 if type(network.head) is nn.Linear else 2  # one output per bit, unless a LoRA sits in the head
    return rows * tokens * products(network.head) * classes // 2 + rows * products(network.head_modulation)


def text_flops(network: Any, lengths: Sequence[int]) -> int:
    """What the backbone derives from texts of so many tokens."""
    tokens, texts, width = sum(lengths), len(lengths), int(network.config["width"])
    per_token = products(network.text_pool.kv) + sum(products(network.text_proj[i]) for i in (0, 2))
    per_token += sum(products(block.cross.kv) for block in network.blocks)
    per_text = 4 * max(lengths) * width + products(network.text_pool.proj) + products(network.shared_modulation)
    return tokens * per_token + texts * per_text


def prefill_flops(network: Any, adapter: ControlAdapter, *, name: str, rows: int, plan: ScaleSchedule) -> int:
    """The condition pass of a control, with its LoRA `name`."""
    width, tokens = network.config["width"], plan.length
    work = rows * tokens * products(network.code_embed, name)
    for layer in range(adapter.blocks[-1] + 1):
        block = network.blocks[layer]
        work += rows * tokens * products(block.attn.qkv, name)
        if layer < adapter.blocks[-1]:  # of the last block keys and values alone are needed
            rest = (block.attn.proj, block.ffn.fc1, block.ffn.fc2)
            work += rows * tokens * sum(products(part, name) for part in rest)
            work += 4 * rows * pairs(reference_ranges(plan.steps, adapter.scope), tokens, tokens) * width
    if adapter.config.condition_modulation == "null":
        work += text_flops(network, [min(adapter.config.null_tokens, network.config["text_length"])])
    return work


def token_bytes(network: Any) -> int:
    """Key and value of one token in one layer."""
    return 2 * int(network.config["width"]) * int(network.blocks[0].attn.q_bias.element_size())


def text_bytes(network: Any, *, rows: int, prompt: int) -> int:
    """What all layers hold of prompts that are padded to `prompt` tokens."""
    size = int(network.blocks[0].cross.v_bias.element_size())
    return rows * int(network.config["width"]) * (2 * prompt * size * len(network.blocks) + 4 * 7)


def bare_text(network: Any, *, rows: int, prompt: int, masked: bool) -> TextContext:
    """A text context without memory."""
    heads, width = network.config["heads"], network.config["width"]
    dtype = network.blocks[0].cross.v_bias.dtype
    keys = torch.empty(rows, heads, prompt, width // heads, dtype=dtype, device="meta")
    mask = torch.empty(rows, 1, 1, prompt, dtype=torch.bool, device="meta") if masked else None
    pooled, modulation = (torch.empty(rows, *shape, width, device="meta") for shape in ((), (1, 6)))
    return TextContext(pooled, modulation, [keys] * len(network.blocks), [keys] * len(network.blocks), mask)


def bare_vae(vae: Any) -> Any:
    """The tokenizer without memory, which works as on its own device."""
    bare = without_storage(vae)
    for part in bare.modules():
        if isinstance(part, Upsample):
            part.forward = partial(part.as_on, vae.device.type)  # type: ignore[method-assign]
    return bare


def decode_cost(vae: Any, height: int, width: int) -> tuple[int, int]:
    """(operations, most bytes in between) of decoding one picture."""
    bare, stride = bare_vae(vae), vae.config["stride"]
    latent = torch.empty(1, vae.config["bits"], height // stride, width // stride, device="meta")
    with torch.no_grad():
        return convolutions(lambda: bare.decode(latent))


def convolutions(run: Callable[[], Any]) -> tuple[int, int]:
    """(operations, most bytes in between) of an encoder or decoder on the meta device."""
    with FlopCounterMode(display=False) as counter:
        between = dry_peak_bytes(run)
    return counter.get_total_flops(), between
