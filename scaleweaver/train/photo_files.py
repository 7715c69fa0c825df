"""Which photos a folder holds: captions, ready control maps, sizes, and where the bytes of each lie.

Three layouts, all of Hugging Face's tools:

    imagefolder with captions beside      a.jpg, a.txt; every line of the text is one wording
    imagefolder with metadata             metadata.jsonl or metadata.csv: file_name, text, conditioning_image
    webdataset                            shards *.tar: 000.jpg, 000.txt or 000.json, 000.conditioning_image.png

A ready map of a control called NAME is `conditioning_image_NAME` or, for the only control of a run,
`conditioning_image`: a column of the metadata, a folder with the pictures' names in it, or a member of the shard.
Every picture is decoded once, to know that it can be; the verdicts and the shards' tables are kept in an index file.
Pictures that are damaged, unreadable or without a caption are left out and named.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from scaleweaver.images import MAX_PIXELS, read_image

logger = logging.getLogger(__name__)

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAP = "conditioning_image"
CAPTIONS = ("text", "caption", "captions")  # columns and keys, the first that is there


@dataclass(frozen=True)
class Place:
    """Bytes on disk: a whole file, or a member of a tar file."""

    file: Path
    name: str  # of the picture, for messages and as its identity; relative to the folder
    offset: int = 0
    length: int | None = None

    def read(self) -> bytes:
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            return opened.read(-1 if self.length is None else self.length)

    def picture(self) -> Image.Image:
        """Upright RGB; a ValueError names what cannot be decoded."""
        try:
            with Image.open(BytesIO(self.read())) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise ValueError(f"{self.name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down")
                opened.load()
                return read_image(opened, self.name)
        except UnidentifiedImageError:
            raise ValueError(f"{self.name} is not an image file that can be read") from None
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.name} is damaged or truncated ({error})") from None


@dataclass(frozen=True)
class Photo:
    """One picture with its wordings and ready maps: by control, or "" for the only one."""

    place: Place
    captions: tuple[str, ...]
    maps: Mapping[str, Place] = field(default_factory=dict)
    height: int = 0
    width: int = 0


def find_photos(folder: str | os.PathLike[str], index: Path) -> list[Photo]:
    """All photos of a folder that can be used, in the order of their names; `index` keeps what was found out."""
    root = Path(folder)
    if not root.exists():
        raise ValueError(f"there is no folder {str(root)!r}; pass one with pictures and captions, or with tar shards")
    known = _Index(index)
    listed = sorted(_listed(root, known), key=lambda photo: photo.place.name)
    kept, refused = [], []
    for photo in listed:
        size = known.size(photo.place) if photo.captions else "it has no caption"
        if isinstance(size, str):
            refused.append(f"{photo.place.name}: {size}")
        else:
            kept.append(Photo(photo.place, photo.captions, photo.maps, *size))
    known.save()
    if refused:
        named = "; ".join(refused[:5]) + ("; ..." if len(refused) > 5 else "")
        logger.warning("%d of %d pictures in %s are left out: %s", len(refused), len(listed), root, named)
    if not kept:
        raise ValueError(
            f"{str(root)!r} holds no usable picture with a caption ({len(refused)} were left out"
            f"{': ' + refused[0] if refused else ''}); write a .txt beside every picture, a metadata.jsonl with "
            "file_name and text in each line, or webdataset shards"
        )
    return kept


def _listed(root: Path, known: _Index) -> Iterator[Photo]:
    tables = sorted([*root.rglob("metadata.jsonl"), *root.rglob("metadata.csv")])
    shards = [root] if root.suffix == ".tar" else sorted(root.rglob("*.tar"))
    if tables and shards:
        raise ValueError(
            f"{str(root)!r} holds {tables[0].name} and {shards[0].name}; give shards a folder of their own"
        )
    if shards:
        for shard in shards:
            yield from _of_shard(shard, known)
    elif tables:
        for table in tables:
            yield from _of_table(root, table)
    else:
        yield from _of_files(root)


def _of_files(root: Path) -> Iterator[Photo]:
    """Pictures with a .txt beside them; folders conditioning_image* hold maps under the same names."""
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS):
        relative = file.relative_to(root)
        if relative.parts[0].startswith(MAP):
            continue
        text = file.with_suffix(".txt")
        wordings = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
        maps = {}
        for folder in sorted(root.glob(f"{MAP}*/")):
            for ending in ENDINGS:
                if (beside := (folder / relative).with_suffix(ending)).is_file():
                    maps[_control(folder.name)] = Place(beside, str(beside.relative_to(root)))
        yield Photo(Place(file, str(relative)), _wordings(wordings), maps)


def _of_table(root: Path, table: Path) -> Iterator[Photo]:
    """The rows of a metadata file; its paths start at its own folder."""
    with table.open(encoding="utf-8", newline="") as opened:
        if table.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(opened))
        else:
            rows = [json.loads(line) for line in opened if line.strip()]
    for number, row in enumerate(rows, 1):
        if not row.get("file_name"):
            raise ValueError(f"{table}: entry {number} has no file_name; name the picture it is about")

        def place(name: str) -> Place:
            file = table.parent / name
            return Place(file, os.path.relpath(file, root))

        maps = {}
        for column, value in row.items():
            if column.startswith(MAP) and isinstance(value, str) and value:
                maps[_control(column.removesuffix("_file_name"))] = place(value)
        yield Photo(place(row["file_name"]), _wordings(_first(row)), maps)


def _of_shard(shard: Path, known: _Index) -> Iterator[Photo]:
    """Members that share what stands before the first point of their name."""
    samples: dict[str, dict[str, Place]] = {}
    for name, offset, length in known.members(shard):
        folder, _, file = name.rpartition("/")
        key, _, ending = file.partition(".")
        sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
        sample[ending.lower()] = Place(shard, f"{shard.name}/{name}", offset, length)
    for key, sample in samples.items():
        pictures = [place for ending, place in sample.items() if f".{ending}" in ENDINGS]
        if not pictures:
            continue
        if len(pictures) > 1:
            raise ValueError(f"{shard.name} holds {len(pictures)} pictures called {key}; give each sample its own name")
        wordings: Any = []
        if "json" in sample:
            wordings = _first(json.loads(sample["json"].read()))
        if "txt" in sample and not wordings:
            wordings = sample["txt"].read().decode("utf-8").splitlines()
        maps = {
            _control(ending.rpartition(".")[0]): place
            for ending, place in sample.items()
            if ending.startswith(MAP) and f".{ending.rpartition('.')[2]}" in ENDINGS
        }
        yield Photo(pictures[0], _wordings(wordings), maps)


def _control(column: str) -> str:
    """conditioning_image_depth -> depth, conditioning_image -> ""."""
    return column.removeprefix(MAP).removeprefix("_")


def _first(record: Any) -> Any:
    found = [record[name] for name in CAPTIONS if isinstance(record, Mapping) and record.get(name)]
    return found[0] if found else []


def _wordings(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    return tuple(text for one in texts if (text := str(one).strip()))


class _Index:
    """Sizes of pictures and tables of shards, each valid as long as its file has the same length and time."""

    def __init__(self, path: Path):
        self.path = path
        self.old: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.new: dict[str, Any] = {}
        self._stamps: dict[Path, list[int] | None] = {}

    def members(self, shard: Path) -> list[tuple[str, int, int]]:
        """Name, offset and length of every file in a shard."""
        return [(name, offset, length) for name, offset, length in self._kept(str(shard), shard, lambda: _table(shard))]

    def size(self, place: Place) -> tuple[int, int] | str:
        """(height, width) of the upright picture, or what is wrong with it."""
        if not place.file.is_file():
            return "there is no such file"
        found = self._kept(f"{place.file}:{place.offset}", place.file, lambda: _size(place))
        return found if isinstance(found, str) else (found[0], found[1])

    def _kept(self, key: str, file: Path, find: Any) -> Any:
        if file not in self._stamps:
            status = file.stat()
            self._stamps[file] = [status.st_size, status.st_mtime_ns]
        stamp = self._stamps[file]
        entry = self.old.get(key)
        self.new[key] = entry if entry and entry[0] == stamp else [stamp, find()]
        return self.new[key][1]

    def save(self) -> None:
        if self.new != self.old:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            partial.write_text(json.dumps(self.new))
            os.replace(partial, self.path)


def _table(shard: Path) -> list[tuple[str, int, int]]:
    try:
        with tarfile.open(shard) as opened:
            return [(member.name, member.offset_data, member.size) for member in opened if member.isfile()]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is no complete tar file ({error}); copy it again") from None


def _size(place: Place) -> list[int] | str:
    try:
        picture = place.picture()
    except ValueError as error:
        return str(error)
    return [picture.height, picture.width]
