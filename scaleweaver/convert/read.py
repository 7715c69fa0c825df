"""Foreign weight files as plain tensors, mapped from disk and never executed.

Pickles go through torch's restricted reader (`weights_only=True`): it makes tensors and plain containers and refuses
every other object, because making one can run any code.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def read_weights(path: str | os.PathLike[str], inside: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors by name from a file, or from a folder of shards with an index.

    `inside` names the dotted entries a file may keep them under ("vae", "trainer.gpt_fsdp"); the first one there is
    read and what lies beside it is left alone. A file without any of them is read as it is.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, inside)
    if not path.is_file():
        raise ValueError(f"there is no file or folder {str(path)!r}; check the path")
    content = _load(path)
    for entry in inside:
        found: Any = content
        for key in entry.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            return _tensors(found, path, f" under {entry!r}")
    return _tensors(content, path)


def _read_folder(folder: Path, inside: Sequence[str]) -> dict[str, Tensor]:
    """A folder with one weight file, or with shards and the JSON index that says which tensor lies where."""
    indices = sorted(folder.glob("*.index.json"), key=lambda file: ".safetensors." not in file.name)
    if not indices:
        files = [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHTS]
        if len(files) == 1:
            return read_weights(files[0], inside)
        raise ValueError(
            f"{str(folder)!r} holds {len(files)} weight files and no index (*.index.json); pass the file itself, or "
            "the complete folder of a sharded checkpoint"
        )
    where = _read_index(indices[0])
    absent = sorted({name for name in where.values() if not (folder / name).is_file()})
    if absent:
        raise ValueError(f"{str(folder)!r} lacks the shards {', '.join(absent)}; download the folder again")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        for key, tensor in _tensors(_load(folder / name), folder / name).items():
            if where.get(key, name) != name or key in weights:
                raise ValueError(f"{name} holds {key!r}, which lies elsewhere too; the shards are of different files")
            weights[key] = tensor
    if lost := sorted(where.keys() - weights.keys()):
        raise ValueError(f"{indices[0].name} promises {shortened(lost)}, which no shard holds; download them again")
    return weights


def _read_index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = {str(key): str(name) for key, name in where.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} is no index of shards: it lacks a weight_map of tensors to files") from None
    for name in plain.values():
        # an index may only point beside itself
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{str(path)!r} points to {name!r}; a shard must lie in the same folder")
    return plain


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no complete safetensors file ({error}); download it again") from None
    try:
        # only the zip format, torch's own since 1.6, can be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"a Python object, {found[1]}," if found else "something else than tensors, or it is no checkpoint"
        raise ValueError(
            f"{str(path)!r} is refused: it holds {what} and reading that could run any code. Take a file of tensors "
            "alone (.safetensors is always one); if you trust this one, save its tensors as such where it was made"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} is no complete checkpoint ({reason}); download it again") from None


def _tensors(content: Any, path: Path, place: str = "") -> dict[str, Tensor]:
    """The content if it is tensors by name and nothing else."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}{place}; expected tensors by name")
    others = [f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise ValueError(
            f"{str(path)!r} holds no tensors by name{place} but {shortened(others) or 'nothing'}; pass the file of the "
            "weights alone"
        )
    return {str(key): tensor.detach() for key, tensor in content.items()}


def shortened(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
