"""Low-rank updates of a backbone's linear layers that act only where a control asks for them.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), layers and files by PEFT. A control's LoRA
works on condition tokens alone, so it is off between condition passes and the plain image pass stays the base model
to the bit; other adapters of the backbone (a style LoRA, say) stay as they are in the image pass and are off in the
condition pass.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

PREFIX = "base_model.model."  # what PEFT puts before every key of a saved adapter


def check_name(name: str) -> None:
    """A control's name is a folder, a part of parameter names and a keyword: keep it simple."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"control name {name!r}: expected letters, digits, '-' and '_', starting with a letter or digit"
        )
    # PEFT finds adapters by name inside ModuleDicts and inside keys such as lora_A.<name>.weight
    if hasattr(nn.ModuleDict, name) or name in "lora_" or name in ("weight", "bias", "base_layer", "training"):
        raise ValueError(
            f"control name {name!r} has a meaning in torch or PEFT; choose another, for example 'my_{name}'"
        )


def lora_layers(module: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Wrapped layers below `module`, all of them or those that hold the adapter `name`."""
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and (name is None or name in layer.lora_A):
            yield path, layer


def lora_names(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that the backbone holds."""
    return tuple(getattr(backbone, "peft_config", {}))


def lora_pattern(targets: Sequence[str], blocks: int) -> str:
    """Regular expression of the layers to wrap in the first `blocks` blocks.

    Of the last block the condition stream needs keys and values only, so nothing behind `attn.qkv` is wrapped there.
    """
    parts = []
    if blocks > 1:
        before = "|".join(str(block) for block in range(blocks - 1))
        parts.append(rf"blocks\.({before})\.({'|'.join(re.escape(target) for target in targets)})")
    if "attn.qkv" in targets:
        parts.append(rf"blocks\.{blocks - 1}\.attn\.qkv")
    return "|".join(parts)


def lora_shapes(backbone: nn.Module, pattern: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter that `pattern` would give this backbone; nothing is changed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in backbone.named_modules():
        if path and re.fullmatch(pattern, path):
            base = layer.base_layer if isinstance(layer, LoraLayer) else layer
            if not isinstance(base, nn.Linear):
                raise ValueError(f"lora_targets name {path!r}, a {type(base).__name__}; expected linear layers")
            shapes[f"{path}.lora_A.weight"] = (rank, base.in_features)
            shapes[f"{path}.lora_B.weight"] = (base.out_features, rank)
    return shapes


def add_lora(backbone: nn.Module, name: str, *, pattern: str, rank: int, alpha: int) -> None:
    """Wrap the layers that `pattern` matches, with the new adapter trainable and switched off.

    The backbone's own weights are frozen, as PEFT does; other adapters keep their state. The update starts at zero (B
    = 0).
    """
    check_name(name)
    if not lora_shapes(backbone, pattern, rank):
        raise ValueError(f"no layer of {type(backbone).__name__} matches {pattern!r}; check lora_targets")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0, bias="none")
    inject_lora(backbone, name, config)


def inject_lora(backbone: nn.Module, name: str, config: LoraConfig) -> None:
    """`add_lora` by a config of PEFT's."""
    if name in lora_names(backbone):
        raise ValueError(f"the backbone already holds an adapter {name!r}; remove it first or choose another name")
    # injecting makes the new adapter the only active and the only trainable one everywhere: put that back
    active = {path: layer.active_adapters for path, layer in lora_layers(backbone)}
    grads = {id(p): p.requires_grad for _, layer in lora_layers(backbone) for p in _adapter_parameters(layer)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, backbone, name)
    backbone._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' own adapter methods ask for it
    for path, layer in lora_layers(backbone):
        layer._active_adapter = active.get(path, [])
        for parameter in _adapter_parameters(layer):
            parameter.requires_grad_(grads.get(id(parameter), True))


def remove_lora(backbone: nn.Module, name: str) -> None:
    """Take the adapter out; layers without any other adapter become plain again, others stay on or off."""
    require_lora(backbone, name)
    for path, layer in list(lora_layers(backbone, name)):
        # deleting an active adapter would switch on any other, also that of a control
        layer._active_adapter = [other for other in layer.active_adapters if other != name]
        layer.delete_adapter(name)
        if not layer.lora_A:
            backbone.set_submodule(path, layer.get_base_layer())
    configs: dict[str, Any] = backbone.peft_config  # type: ignore[assignment]
    del configs[name]
    if not configs:
        del backbone.peft_config
        backbone._hf_peft_config_loaded = False  # type: ignore[assignment]


@contextmanager
def lora_enabled(module: nn.Module, name: str) -> Iterator[None]:
    """Switch the adapter `name` on and every other one off below `module`, until the block is left.

    Sets which adapter each layer reads and nothing else: PEFT's own switches also reset `requires_grad`, after which
    nothing trains. The layers are shared, so two threads must not use one backbone at the same time.
    """
    layers = [layer for _, layer in lora_layers(module)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], False
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def lora_detached(backbone: nn.Module) -> Iterator[None]:
    """Show the backbone without any adapter, under its plain parameter names, for example to save it."""
    wrapped = list(lora_layers(backbone))
    try:
        for path, layer in wrapped:
            backbone.set_submodule(path, layer.get_base_layer())
        yield
    finally:
        for path, layer in wrapped:
            backbone.set_submodule(path, layer)


def lora_parameters(backbone: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's weights under their file names, such as `blocks.0.attn.qkv.lora_A.weight`."""
    require_lora(backbone, name)
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(backbone, name):
        parameters[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
        parameters[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
    return parameters


def set_alpha(backbone: nn.Module, name: str, alpha: int) -> None:
    """Change the alpha of an adapter that is already there; the update counts alpha / rank."""
    backbone.peft_config[name].lora_alpha = alpha  # type: ignore[index, union-attr]
    for _, layer in lora_layers(backbone, name):
        layer.lora_alpha[name] = alpha
        layer.set_scale(name, 1.0)


@torch.no_grad()
def load_lora(backbone: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy file tensors into an adapter that is already there; keys and shapes were checked before."""
    for key, parameter in lora_parameters(backbone, name).items():
        parameter.copy_(tensors[key])


def _adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    for part in layer.adapter_layer_names:
        yield from getattr(layer, part).parameters()


def require_lora(backbone: nn.Module, name: str) -> None:
    if name not in lora_names(backbone):
        held = ", ".join(lora_names(backbone)) or "none"
        raise ValueError(f"the backbone holds no adapter {name!r} (it holds: {held}); add or load the control first")
