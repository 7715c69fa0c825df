"""Results of several trainings put together as they ship: bf16 safetensors in the Hub layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scaleweaver.pipeline import VARControlPipeline


def assemble(
    out: Path, model: str | Path, controls: Sequence[str | Path] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """A whole pipeline, and controls trained on their own, in the folder `out`; a model card that lies there is kept.

    `defaults` are the settings that the pipeline draws with unless told otherwise, such as guidance_scale.
    """
    pipe = VARControlPipeline.from_pretrained(model, **(defaults or {})).to(torch.bfloat16)
    for folder in controls:
        pipe.load_control(folder)
    card = out / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    shutil.rmtree(out, ignore_errors=True)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path=out.name)  # not the folder of the run
    pipe.save_pretrained(out)
    if text is not None:
        card.write_text(text, encoding="utf-8")


def copy_halved(out: Path, network: str | Path) -> None:
    """A saved network in the folder `out`, with float32 weights as bf16; a model card that lies there is kept."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in Path(network).iterdir() if path.is_file()):
        if file.suffix == ".safetensors":
            weights = load_file(file)
            halved = {name: x.bfloat16() if x.dtype == torch.float32 else x for name, x in weights.items()}
            save_file(halved, out / file.name, metadata={"format": "pt"})
        else:
            shutil.copyfile(file, out / file.name)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all weights below a folder, by path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
