"""Adding, saving, loading and removing a control.

A control is a `ControlAdapter` plus a LoRA that lives in the backbone under the control's name. Its folder holds

    control_config.json         how it works and which backbone it fits
    control.safetensors         the adapter's weights
    adapter_config.json         the LoRA, as PEFT writes it
    adapter_model.safetensors

so that PEFT's own tools read the LoRA.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaleweaver.cards import CONTROL_FILE, Card, write_card
from scaleweaver.lora import (
    PREFIX,
    add_lora,
    check_name,
    load_lora,
    lora_detached,
    lora_enabled,
    lora_parameters,
    lora_pattern,
    lora_shapes,
    remove_lora,
    set_alpha,
)
from scaleweaver.methods.scaleweaver import ControlAdapter, ScaleWeaverConfig

__all__ = [
    "add_control",
    "control_kind",
    "load_control",
    "lora_detached",
    "lora_enabled",
    "remove_control",
    "replace_control",
    "save_control",
    "trainable_parameters",
]

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = CONTROL_FILE, "control.safetensors"
LORA_CONFIG_FILE, LORA_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

Shapes = dict[str, tuple[int, ...]]


def add_control(backbone: Any, config: ScaleWeaverConfig, name: str) -> ControlAdapter:
    """A fresh control: the adapter, and its LoRA in the backbone, switched off. Freezes the backbone's own weights.

    Adapter and LoRA have the backbone's device and dtype; both are trainable.
    """
    check_name(name)
    adapter = _adapter(backbone, config).to(backbone.code_embed.weight)
    add_lora(backbone, name, pattern=_pattern(adapter.config), rank=config.lora_rank, alpha=config.alpha)
    return adapter


def remove_control(backbone: Any, name: str) -> None:
    """Take the control's LoRA out of the backbone."""
    remove_lora(backbone, name)


def trainable_parameters(backbone: Any, adapter: ControlAdapter, name: str) -> dict[str, torch.nn.Parameter]:
    """All weights of a control: the adapter's under `control.`, the LoRA's under `lora.`."""
    own = {f"control.{key}": parameter for key, parameter in adapter.named_parameters()}
    return own | {f"lora.{key}": parameter for key, parameter in lora_parameters(backbone, name).items()}


def save_control(
    folder: str | Path, backbone: Any, adapter: ControlAdapter, name: str, *, base: str | None = None
) -> None:
    """Write the control's four files and, if there is none yet, a model card, which names the pipeline `base`."""
    lora = lora_parameters(backbone, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone.peft_config[name].save_pretrained(folder)
    save_file({PREFIX + key: _plain(x) for key, x in lora.items()}, folder / LORA_WEIGHTS_FILE, {"format": "pt"})
    save_file({key: _plain(x) for key, x in adapter.state_dict().items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    data = {"format": FORMAT, "method": "scaleweaver", "backbone": _fits(backbone), "config": adapter.config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if not (folder / "README.md").exists():
        write_card(folder, Card(), name=folder.name, base=base)


def load_control(folder: str | Path, backbone: Any, name: str, *, trainable: bool = False) -> ControlAdapter:
    """Read a control into the backbone under `name`, whatever it was called when it was saved.

    All files are checked first; if something does not fit the backbone, a ValueError says what and nothing changes.
    """
    check_name(name)
    saved = _read(Path(folder), backbone)
    adapter = add_control(backbone, saved.config, name)
    _fill(backbone, adapter, name, saved)
    for parameter in trainable_parameters(backbone, adapter, name).values():
        parameter.requires_grad_(trainable)
    return adapter


def replace_control(folder: str | Path, backbone: Any, adapter: ControlAdapter, name: str) -> ControlAdapter:
    """Read a control in place of the one that is there under `name`; a folder that does not fit changes nothing.

    If both wrap the same layers at the same rank, only numbers change: modules and `adapter` stay the same objects,
    which compiled graphs hold on to.
    """
    saved = _read(Path(folder), backbone)
    shapes = {key: x.shape for key, x in adapter.state_dict().items()}
    alike = _pattern(saved.config) == _pattern(adapter.config) and saved.config.lora_rank == adapter.config.lora_rank
    if not alike or shapes != {key: x.shape for key, x in saved.weights.items()}:
        trainable = any(parameter.requires_grad for parameter in adapter.parameters())
        remove_control(backbone, name)
        adapter = add_control(backbone, saved.config, name)
        for parameter in trainable_parameters(backbone, adapter, name).values():
            parameter.requires_grad_(trainable)
    _fill(backbone, adapter, name, saved)
    set_alpha(backbone, name, saved.config.alpha)
    adapter.config, adapter.edition = saved.config, uuid4().hex
    return adapter


@dataclass(frozen=True)
class _Saved:
    """A control's folder, read and found to fit."""

    config: ScaleWeaverConfig
    weights: dict[str, Tensor]
    lora: dict[str, Tensor]


def _fill(backbone: Any, adapter: ControlAdapter, name: str, saved: _Saved) -> None:
    adapter.load_state_dict(saved.weights)
    load_lora(backbone, name, saved.lora)


def _read(folder: Path, backbone: Any) -> _Saved:
    config, trained = _read_config(folder / CONFIG_FILE)
    _check_fit(folder, trained, _fits(backbone))
    expected = _adapter(backbone, config, device="meta")
    lora = read_json(folder / LORA_CONFIG_FILE)
    if (lora.get("r"), lora.get("lora_alpha")) != (config.lora_rank, config.alpha):
        raise ValueError(
            f"{folder}: {LORA_CONFIG_FILE} says rank {lora.get('r')} and alpha {lora.get('lora_alpha')}, {CONFIG_FILE} "
            f"says {config.lora_rank} and {config.alpha}; the files belong to different controls"
        )
    shapes = lora_shapes(backbone, _pattern(expected.config), config.lora_rank)
    _check_shapes(folder / LORA_WEIGHTS_FILE, {PREFIX + key: shape for key, shape in shapes.items()})
    _check_shapes(folder / WEIGHTS_FILE, {key: tuple(x.shape) for key, x in expected.state_dict().items()})
    tensors = load_file(folder / LORA_WEIGHTS_FILE)
    own = {key.removeprefix(PREFIX): x for key, x in tensors.items()}
    return _Saved(expected.config, load_file(folder / WEIGHTS_FILE), own)


def control_kind(folder: str | Path) -> str:
    """The kind of a saved control."""
    return _read_config(Path(folder) / CONFIG_FILE)[0].kind


def _read_config(path: Path) -> tuple[ScaleWeaverConfig, dict[str, Any]]:
    """How a saved control works, and what it says of its backbone."""
    data = read_json(path)
    if data.get("format") != FORMAT or data.get("method") != "scaleweaver":
        raise ValueError(
            f"{path} says format {data.get('format')!r}, method {data.get('method')!r}; this version reads format "
            f"{FORMAT}, method 'scaleweaver': a newer scaleweaver may be needed"
        )
    settings, trained = data.get("config"), data.get("backbone")
    if not isinstance(settings, dict) or not isinstance(trained, dict) or not isinstance(settings.get("kind"), str):
        raise ValueError(f"{path} lacks the kind, the settings or the backbone; download or save the control again")
    try:
        return ScaleWeaverConfig.from_dict(settings), trained
    except TypeError as error:  # a number where a list belongs, or the like
        raise ValueError(f"{path} is damaged ({error}); download or save the control again") from error


def _adapter(backbone: Any, config: ScaleWeaverConfig, device: str | None = None) -> ControlAdapter:
    sizes = _fits(backbone)
    with torch.device(device or "cpu"):
        return ControlAdapter(config, depth=sizes["depth"], width=sizes["width"], bits=sizes["bits"])


def _pattern(config: ScaleWeaverConfig) -> str:
    return lora_pattern(config.lora_targets, config.blocks[-1] + 1)


def _fits(backbone: Any) -> dict[str, Any]:
    """What a backbone must share with the one a control was trained on."""
    config = backbone.config
    sizes = {key: int(config[key]) for key in ("depth", "width", "heads", "bits")}
    return {"class": type(backbone).__name__, **sizes}


def _plain(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous()


def _check_fit(folder: Path, trained: dict[str, Any], present: dict[str, Any]) -> None:
    wrong = [
        f"{key} {trained.get(key)} (this model: {value})" for key, value in present.items() if trained.get(key) != value
    ]
    if wrong:
        raise ValueError(
            f"the control in {folder} was trained for another backbone: {', '.join(wrong)}; load one made for it"
        )


def read_shapes(path: Path) -> Shapes:
    """Keys and shapes in a safetensors header; weights stay unread."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the adapter's folder is incomplete, download or save it again")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); download or save it again") from error


def _check_shapes(path: Path, expected: Shapes) -> None:
    """Compare a file with what the backbone needs."""
    found = read_shapes(path)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    wrong = [
        f"{key} is {found[key]}, expected {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    problems = [f"missing {_some(missing)}"] * bool(missing) + [f"unknown {_some(extra)}"] * bool(extra)
    problems += [_some(wrong)] * bool(wrong)
    if problems:
        raise ValueError(f"{path} does not fit this backbone: {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a saved adapter."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; pass the folder of a control, which holds {CONFIG_FILE}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON ({error}); download or save the control again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected an object with settings")
    return data
