"""A run of several stages as numbered files of limited size, to go on with it on another machine.

A manifest lists the files of the run and the pieces that their bytes are cut into, each with its SHA-256. What can be
computed again (renders, latents) stays behind, and so do results that no stage to come takes.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from scaleweaver.train.checkpoints import STATE_FILE, newest_checkpoint
from scaleweaver.train.curves import CURVES
from scaleweaver.train.stages import FINISHED, RECORD, Plan, Stage
from scaleweaver.train.throughput import FILE as THROUGHPUT

MANIFEST = "manifest.json"
FORMAT = 1
PIECE = 16 * 2**20
LIMIT = 8 * PIECE
READ = 2**20

# what is given up, one after the other, until a checkpoint fits
FORMS = {
    "whole": "",
    "without optimizer": "the optimizer's state is left out and will start afresh",
    "rounded": "the optimizer's state is left out and will start afresh; weights are rounded to bf16",
}


def pack(plan: Plan, folder: Path, *, piece: int = PIECE, limit: int = LIMIT) -> list[str]:
    """Writes the run into `folder`, in files of `piece` bytes, at most `limit` together; says what it left out.

    Raises ValueError where even rounded weights do not fit, for a run that has not begun, and for a folder that holds
    something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; pass a new folder")
    if not any(stage.finished or stage.steps_done for stage in plan.stages):
        raise ValueError(f"the run in {plan.out} has not made a step, so there is nothing to pack; run it first")
    begun = [stage for stage in plan.stages if not stage.finished and stage.steps_done]
    files = _files(plan)
    with tempfile.TemporaryDirectory() as kept:
        for form in FORMS:
            chosen = dict(files)
            for stage in begun:
                chosen |= _checkpoint(stage, form, Path(kept), plan.out)
            size = sum(path.stat().st_size for path in chosen.values())
            if size <= limit:
                break
            if not begun or form == "rounded":
                raise ValueError(
                    f"the run in {plan.out} has {size / 2**20:.1f} MiB, more than the {limit / 2**20:.1f} that pieces "
                    "may have; pass a higher --mebibytes, or finish the stage first"
                )
        folder.mkdir(parents=True, exist_ok=True)
        cut = _cut(chosen.values(), folder, piece)
        manifest = {
            "format": FORMAT,
            "preset": plan.preset,
            "form": form,
            "steps": {stage.name: stage.steps_done for stage in plan.stages},
            "files": [
                {"path": path, "bytes": file.stat().st_size, "sha256": _digest(file)} for path, file in chosen.items()
            ],
            "pieces": cut,
        }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    said = [f"{size / 2**20:.1f} MiB in {len(cut)} pieces and {MANIFEST}"]
    return said + ([FORMS[form]] if FORMS[form] else [])


def unpack(plan: Plan, folder: Path) -> list[str]:
    """Puts a packed run into the folder of the plan; nothing is written before all of it is found whole.

    Raises ValueError for pieces that are damaged, of another preset, or behind the run that is there.
    """
    manifest = _read_manifest(folder)
    if manifest.preset != plan.preset:
        raise ValueError(f"{folder} holds a run of preset {manifest.preset!r}, not {plan.preset!r}; pass --preset")
    for stage in plan.stages:
        if stage.steps_done > manifest.steps.get(stage.name, 0):
            raise ValueError(
                f"{stage.out} has {stage.steps_done} steps, the pieces {manifest.steps.get(stage.name, 0)}; "
                "pass another folder as --out"
            )
    root = plan.out.resolve()
    for entry in manifest.files:  # a link in the folder could lead out of it
        if not (root / entry.name).resolve().is_relative_to(root):
            raise ValueError(f"{entry.name} would be written outside of {plan.out}; remove the link that leads there")
    plan.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.out, prefix="unpack-") as beside:
        _join(manifest, folder, Path(beside))
        for entry in manifest.files:
            if manifest.form == "rounded" and PurePosixPath(entry.name).name == STATE_FILE:
                _save(_cast(_load(Path(beside, entry.name)), torch.float32), Path(beside, entry.name))
        # checkpoints and marks last: a run that is cut off here has everything that they speak of
        for entry in sorted(manifest.files, key=lambda e: PurePosixPath(e.name).name in (STATE_FILE, FINISHED)):
            target = plan.out / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(beside, entry.name).replace(target)
    said = [f"{len(manifest.files)} files in {plan.out}"]
    return said + ([FORMS[manifest.form]] if FORMS[manifest.form] else [])


@dataclass(frozen=True)
class Entry:
    """A file or a piece."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    preset: str
    form: str
    steps: dict[str, int]
    files: list[Entry]
    pieces: list[Entry]


def _files(plan: Plan) -> dict[str, Path]:
    """All but the checkpoints, by their path in the folder of the run."""
    waiting = [stage for stage in plan.stages if not stage.finished]
    taken = {name for stage in waiting for name in stage.needs} if waiting else {plan.stages[-1].name}
    found = [plan.out / RECORD]
    for stage in plan.stages:
        found += [stage.out / name for name in (FINISHED, CURVES, THROUGHPUT, "config.json")]
        found += sorted((stage.out / "tokenizer").rglob("*"))  # a vocabulary that the stage has learned
        if stage.finished and stage.name in taken:
            found += sorted((stage.out / "result").rglob("*"))
    return {path.relative_to(plan.out).as_posix(): path for path in found if path.is_file()}


def _checkpoint(stage: Stage, form: str, kept: Path, out: Path) -> dict[str, Path]:
    """The newest checkpoint of a stage, or a smaller form of it made in the folder `kept`."""
    folder = newest_checkpoint(stage.out)
    assert folder is not None  # it has made steps
    file = folder / STATE_FILE
    path = file.relative_to(out).as_posix()
    if form == "whole":
        return {path: file}
    parts = _load(file) | {"optimizer": None}
    smaller = kept / f"{stage.name}-{form}"
    _save(_cast(parts, torch.bfloat16) if form == "rounded" else parts, smaller)
    return {path: smaller}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A checkpoint with its large floating-point tensors in another number format."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype in (torch.float32, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return [_cast(entry, dtype) for entry in value] if isinstance(value, list) else value


def _load(file: Path) -> dict[str, Any]:
    parts: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return parts


def _save(parts: Any, file: Path) -> None:
    torch.save(parts, file)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for data in _blocks(file):
        digest.update(data)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        while data := source.read(READ):
            yield data


def _cut(files: Iterable[Path], folder: Path, size: int) -> list[dict[str, Any]]:
    """The bytes of all files, one after the other, in pieces of at most `size`."""
    written: list[Path] = []
    room = 0
    for file in files:
        for data in _blocks(file):
            while data:
                if not room:
                    written.append(folder / f"piece-{len(written):03d}")
                    room = size
                with written[-1].open("ab") as piece:
                    piece.write(data[:room])
                data, room = data[room:], room - len(data[:room])
    return [{"name": piece.name, "bytes": piece.stat().st_size, "sha256": _digest(piece)} for piece in written]


def _read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, if it is one and asks for nothing that a run would not hold."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}; pass the folder that --pack wrote")
    try:
        values = json.loads(file.read_text())
        if values["format"] != FORMAT or values["form"] not in FORMS:
            raise ValueError("another version wrote it")
        manifest = Manifest(
            str(values["preset"]),
            values["form"],
            {str(name): int(steps) for name, steps in values["steps"].items()},
            [Entry(str(e["path"]), int(e["bytes"]), str(e["sha256"])) for e in values["files"]],
            [Entry(str(e["name"]), int(e["bytes"]), str(e["sha256"])) for e in values["pieces"]],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is no manifest of a packed run ({error}); copy it again") from None
    _check_names([entry.name for entry in manifest.files], _is_inside, file)
    _check_names(
        [entry.name for entry in manifest.pieces], lambda name: bool(re.fullmatch(r"piece-\d{3,}", name)), file
    )
    files, pieces = ([entry.size for entry in entries] for entries in (manifest.files, manifest.pieces))
    if min(files + pieces, default=0) < 0 or sum(files) != sum(pieces):
        raise ValueError(f"{file} lists pieces that do not make up its files; copy it again")
    return manifest


def _is_inside(name: str) -> bool:
    """Whether a path stays below the folder it is joined to, on any system."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:\0")


def _check_names(names: Sequence[str], fits: Callable[[str], bool], file: Path) -> None:
    wrong = [name for name in names if not fits(name)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f"{file} lists {wrong or names}, which is not what --pack writes; nothing was unpacked")


def _join(manifest: Manifest, folder: Path, beside: Path) -> None:
    """The files of a manifest from its pieces, all of them compared with their digests."""
    for entry in manifest.pieces:
        piece = folder / entry.name
        if not piece.is_file() or piece.stat().st_size != entry.size or _digest(piece) != entry.digest:
            raise ValueError(f"{piece} is missing or damaged; copy it again, nothing was unpacked")
    data = (block for entry in manifest.pieces for block in _blocks(folder / entry.name))
    left = b""
    for entry in manifest.files:
        target = beside / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        missing = entry.size
        with target.open("wb") as file:
            while missing:
                left = left or next(data)
                file.write(left[:missing])
                left, missing = left[missing:], missing - len(left[:missing])
        if _digest(target) != entry.digest:
            raise ValueError(f"{entry.name} does not come out of the pieces in {folder}; nothing was unpacked")
