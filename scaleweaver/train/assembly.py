"""Results of several trainings put together as they ship: bf16 safetensors in the Hub layout.

What people wrote about the weights that lay there, cards and pictures, stays where its folder still is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scaleweaver.pipeline import VARControlPipeline


def assemble(
    out: Path, model: str | Path, controls: Sequence[str | Path] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """A whole pipeline, and controls trained on their own, in the folder `out`.

    What lies there is replaced, once the new weights are whole beside it, but for `README.md` and `sheet.*` at any
    depth and the folder `images`. `defaults` are the settings that the pipeline draws with unless told otherwise, such
    as guidance_scale.
    """
    pipe = VARControlPipeline.from_pretrained(model, **(defaults or {})).to(torch.bfloat16)
    for folder in controls:
        pipe.load_control(folder)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path=out.name)  # not the folder of the run
    beside, before = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.before")
    for left in (beside, before):  # by a call that was killed
        shutil.rmtree(left, ignore_errors=True)
    pipe.save_pretrained(beside)
    for file in _written_by_people(out):
        target = beside / file.relative_to(out)
        if target.parent.is_dir() or file.is_relative_to(out / "images"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if out.exists():
        out.rename(before)
    beside.rename(out)
    shutil.rmtree(before, ignore_errors=True)


def _written_by_people(folder: Path) -> Iterator[Path]:
    for pattern in ("**/README.md", "**/sheet.*", "images/**/*"):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def copy_halved(out: Path, network: str | Path) -> None:
    """A saved network in the folder `out`, with float32 weights as bf16; other files that lie there are kept."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in Path(network).iterdir() if path.is_file()):
        if file.suffix == ".safetensors":
            weights = load_file(file)
            halved = {name: x.bfloat16() if x.dtype == torch.float32 else x for name, x in weights.items()}
            partial = out / f"{file.name}.partial"
            save_file(halved, partial, metadata={"format": "pt"})
            os.replace(partial, out / file.name)
        else:
            shutil.copyfile(file, out / file.name)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all weights below a folder, by path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}
