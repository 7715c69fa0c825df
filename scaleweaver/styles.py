"""LoRA that acts on the image: a style, a subject or a fine-tune, beside any controls.

LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), read from the two files that PEFT writes,
adapter_config.json and adapter_model.safetensors. It works on image tokens and on the prompt and is off in the
condition pass of controls, so what was encoded of a control image stays as it is, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from scaleweaver.adapters import CONFIG_FILE, LORA_CONFIG_FILE, LORA_WEIGHTS_FILE, read_json, read_shapes
from scaleweaver.lora import PREFIX, check_name, inject_lora, load_lora, lora_layers, lora_parameters

# what PEFT can put into a LoRA beyond two matrices a layer, and the value that means it did not
_PLAIN = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def load_style(folder: Path, backbone: nn.Module, name: str) -> None:
    """Read a LoRA into the backbone under `name`, switched off.

    All is checked first; if something does not fit the backbone, a ValueError says what and nothing changes.
    """
    check_name(name)
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds a control, whose LoRA is for control images; load it with pipe.load_control")
    settings = read_json(folder / LORA_CONFIG_FILE)
    odd = [
        f"{key}={settings[key]!r}" for key, plain in _PLAIN.items() if settings.get(key) not in (plain, None, [], {})
    ]
    if settings.get("peft_type") != "LORA" or odd:
        found = ", ".join([f"peft_type {settings.get('peft_type')!r}", *odd])
        raise ValueError(f"{folder / LORA_CONFIG_FILE} says {found}; a plain LoRA is what fits here")
    ranks = _ranks(folder / LORA_WEIGHTS_FILE, backbone)
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=settings.get("lora_alpha", 8),
        rank_pattern={re.escape(path): rank for path, rank in ranks.items()},
        alpha_pattern=settings.get("alpha_pattern") or {},
        use_rslora=bool(settings.get("use_rslora")),
        target_modules="|".join(map(re.escape, ranks)),
    )
    tensors = {key.removeprefix(PREFIX): x for key, x in load_file(folder / LORA_WEIGHTS_FILE).items()}
    inject_lora(backbone, name, config)
    load_lora(backbone, name, tensors)
    for parameter in lora_parameters(backbone, name).values():
        parameter.requires_grad_(False)


def set_styles(backbone: nn.Module, weights: Mapping[str, float]) -> None:
    """Switch these on in the image pass, each with its weight, and every other adapter off."""
    for _, layer in lora_layers(backbone):
        layer._active_adapter = [name for name in weights if name in layer.lora_A]
        for name in layer._active_adapter:
            layer.set_scale(name, weights[name])


def _ranks(path: Path, backbone: nn.Module) -> dict[str, int]:
    """Rank by layer, from a file whose every matrix fits a linear layer of the backbone."""
    shapes = {key.removeprefix(PREFIX): shape for key, shape in read_shapes(path).items()}
    linear = {name: getattr(layer, "base_layer", layer) for name, layer in backbone.named_modules()}
    linear = {name: layer for name, layer in linear.items() if isinstance(layer, nn.Linear)}
    ranks, problems = {}, []
    for key, shape in shapes.items():
        name, _, side = key.rpartition(".lora_")
        layer: Any = linear.get(name)
        if side not in ("A.weight", "B.weight") or layer is None:
            problems.append(f"{key} belongs to no linear layer of this {type(backbone).__name__}")
            continue
        rank = shapes.get(f"{name}.lora_A.weight", (0,))[0]
        expected = (rank, layer.in_features) if side == "A.weight" else (layer.out_features, rank)
        if shape != expected or f"{name}.lora_B.weight" not in shapes:
            problems.append(f"{key} is {shape}, expected {expected} with its other half")
        ranks[name] = rank
    if problems or not ranks:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit: {'; '.join(problems[:3]) or 'it is empty'}{more}")
    return ranks
