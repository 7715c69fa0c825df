"""What a model is evaluated on: prompts with the true pictures behind them, control maps, and what meters compare with.

`ToyboxExamples` renders the built-in world, whose depth and key points are exact; `FolderExamples` reads a user's
pictures and captions and makes the maps by a preprocessor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scaleweaver.controls import preprocessor
from scaleweaver.evaluate.meters import Meter, depth_meter, edge_meter, map_meter, pose_meter
from scaleweaver.evaluate.prompts import explicit_caption
from scaleweaver.images import fit, read_image
from scaleweaver.toybox.dataset import ToyboxBatch, draw_batch
from scaleweaver.toybox.drawing import depth_map, draw_skeleton
from scaleweaver.toybox.folder import SETTINGS as RENDERED
from scaleweaver.toybox.scene import Person, attributes, sample_scene
from scaleweaver.toybox.worlds import VERSION, check_same_world
from scaleweaver.train.data import fingerprint
from scaleweaver.train.photo_files import CAPTIONS, ENDINGS

Pixels = NDArray[np.uint8]
EXACT = ("depth", "pose")  # kinds that the built-in world knows without looking at the picture


@dataclass(frozen=True)
class Example:
    """One prompt. `maps` are control images (H, W, 3) by kind, `targets` what a meter of the kind compares with:
    the map itself, inverse depth (H, W), or key points (people, 18, 3). `asked`: `toybox.scene.attributes`.
    """

    number: int
    prompt: str
    reference: Pixels  # (H, W, 3)
    maps: Mapping[str, Pixels] = field(default_factory=dict)
    targets: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] | None = None


class Examples(Protocol):
    """A numbered list of examples; `settings` are JSON-able and say which ones they are."""

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def limit(self) -> int | None:
        """How many there are, None for any number."""
        ...

    @property
    def world(self) -> int | None:
        """Version of the built-in world that the pictures show, None for any other pictures."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Example]: ...


class ToyboxExamples:
    """Scenes of a split in their order, with prompts that say all that may be asked of the picture afterwards.

    Maps other than depth and pose are made by their preprocessor with `detectors[kind]` as settings. With `people`
    only scenes with somebody in them count, as pose needs.
    """

    limit: int | None = None
    world: int | None = VERSION

    def __init__(
        self,
        split: str = "test",
        kinds: Sequence[str] = (),
        *,
        size: int = 128,
        people: bool | None = None,
        detectors: Mapping[str, Mapping[str, Any]] | None = None,
        device: str = "cpu",
    ) -> None:
        self.split, self.size, self.device = split, size, device
        self.people = tuple(kinds) == ("pose",) if people is None else people
        given = dict(detectors or {})
        for kind in EXACT:
            if given.get(kind):
                raise ValueError(
                    f"{kind} of the built-in world is exact and takes no settings; leave out {given[kind]}"
                )
        self.kinds = tuple(kinds)
        self.detectors = {kind: preprocessor(kind, **given.get(kind, {})) for kind in kinds if kind not in EXACT}
        self._indices: list[int] = []  # of the scenes with people, as far as they were looked for
        self._next = 0
        sample_scene(split, 0)  # complains about an unknown split now

    @property
    def settings(self) -> dict[str, Any]:
        made = {kind: str(detector) for kind, detector in self.detectors.items()}
        base = {"data": "toybox", "version": VERSION, "split": self.split, "size": self.size, "people": self.people}
        return base | {"maps": made | {kind: "exact" for kind in self.kinds if kind in EXACT}}

    def index(self, number: int) -> int:
        """The scene's index in its split."""
        if not self.people:
            return number
        while len(self._indices) <= number:
            if any(isinstance(item, Person) for item in sample_scene(self.split, self._next).items):
                self._indices.append(self._next)
            self._next += 1
        return self._indices[number]

    def read(self, numbers: Sequence[int]) -> list[Example]:
        batch = draw_batch(self.split, [self.index(n) for n in numbers], size=self.size, device=self.device)
        pixels = batch.pixels  # (B, H, W, 3)
        return [self._example(number, batch, row, pixels[row]) for row, number in enumerate(numbers)]

    def _example(self, number: int, batch: ToyboxBatch, row: int, picture: Pixels) -> Example:
        maps = {kind: np.asarray(detector(picture)) for kind, detector in self.detectors.items()}
        targets: dict[str, Any] = dict(maps)
        if "depth" in self.kinds:
            targets["depth"] = depth_map(batch.depth[row].numpy())
            maps["depth"] = np.repeat(targets["depth"][..., None], 3, axis=2)
        if "pose" in self.kinds:
            targets["pose"] = batch.keypoints[row]
            maps["pose"] = draw_skeleton(batch.keypoints[row], self.size)
        return Example(
            number, explicit_caption(batch.scenes[row]), picture, maps, targets, attributes(batch.scenes[row])
        )


class FolderExamples:
    """Pictures of a folder with captions: imagefolder's metadata.jsonl (file_name, text), or a .txt beside a picture.

    Of several wordings the first is the prompt; a picture without any is left out. Pictures are cut to (height,
    width). Targets of "depth" and "pose" are what the detector finds before it is drawn.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kinds: Sequence[str] = (),
        *,
        height: int,
        width: int,
        detectors: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.folder, self.height, self.width = Path(folder), height, width
        self.pairs = captions(self.folder)
        given = dict(detectors or {})
        self.detectors: dict[str, Any] = {kind: preprocessor(kind, **given.get(kind, {})) for kind in kinds}
        rendered = self.folder / RENDERED
        self.world: int | None = json.loads(rendered.read_text())["version"] if rendered.is_file() else None
        for kind in kinds:
            if self.world is not None and given.get(kind, {}).get("model") == "toybox":
                check_same_world(f'the built-in network of "{kind}"', VERSION, self.world)

    @property
    def limit(self) -> int | None:
        return len(self.pairs)

    @property
    def settings(self) -> dict[str, Any]:
        listed = [(file.name, file.stat().st_size, text) for file, text in self.pairs]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        made = {kind: str(detector) for kind, detector in self.detectors.items()}
        return {"data": self.folder.name, "pictures": digest, "height": self.height, "width": self.width, "maps": made}

    def read(self, numbers: Sequence[int]) -> list[Example]:
        return [self._example(number, *self.pairs[number]) for number in numbers]

    def _example(self, number: int, file: Path, text: str) -> Example:
        picture = fit(read_image(file), self.height, self.width, name=file.name)
        maps = {kind: np.asarray(detector(picture)) for kind, detector in self.detectors.items()}
        targets: dict[str, Any] = dict(maps)
        if "depth" in maps:
            targets["depth"] = self.detectors["depth"].values(picture)
        if "pose" in maps:
            points = self.detectors["pose"].keypoints(picture)
            # what the skeleton does not show is not asked for
            targets["pose"] = np.where(points[..., 2:] > self.detectors["pose"].threshold, points, 0)
        return Example(number, text, np.asarray(picture), maps, targets)


def captions(folder: Path) -> list[tuple[Path, str]]:
    """(picture, first caption) of a folder, in the order of its metadata.jsonl or of the file names."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; pass toybox, or a folder of pictures with captions")
    table = folder / "metadata.jsonl"
    if table.is_file():
        given = _of_metadata(table)
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
        beside = [(file, file.with_suffix(".txt")) for file in files]
        given = [(file, text.read_text(encoding="utf-8").splitlines()) for file, text in beside if text.is_file()]
    wordings = [(file, [text.strip() for text in texts if text.strip()]) for file, texts in given]
    pairs = [(file, texts[0]) for file, texts in wordings if texts]
    if not pairs:
        raise ValueError(
            f"{str(folder)!r} holds no picture with a caption; write a metadata.jsonl with file_name and text in each"
            " line, or a .txt file beside every picture"
        )
    missing = [file.name for file, _ in pairs if not file.is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {len(missing)} pictures that its metadata names: {missing[0]}, ...")
    return pairs


def _of_metadata(table: Path) -> list[tuple[Path, list[str]]]:
    """Pictures of a metadata.jsonl with their wordings, none where it has none."""
    found = []
    with table.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                file = table.parent / record["file_name"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{table}, line {number} is no JSON object with a file_name; correct it") from None
            texts: Any = next((record[name] for name in CAPTIONS if record.get(name)), [])
            found.append((file, [str(text) for text in (texts if isinstance(texts, list) else [texts])]))
    return found


def partner(number: int, limit: int | None) -> int:
    """The example whose map stands for a wrong one: neighbours in pairs, so that it does not depend on the count."""
    other = number ^ 1
    return other if limit is None or other < limit else max(number - 1, 0)


def meter_of(kind: str, examples: ToyboxExamples | FolderExamples, estimator: Any = None) -> Meter:
    """What reads a kind of map out of pictures: the detector that made the maps, or for what the built-in world knows
    exactly, `estimator` (a `controls.estimator.ToyboxEstimator`), which must not have seen these scenes in training.
    """
    detector: Any = examples.detectors.get(kind)
    if detector is None:
        if estimator is None:
            raise ValueError(f"{kind} of the built-in world is exact and needs an estimator to be found in pictures")
        source = f"{type(estimator).__name__} {fingerprint(estimator)}"
        if kind == "depth":
            return depth_meter(estimator.depths, source)
        return pose_meter(estimator.poses, source)
    if kind == "canny":
        return edge_meter(detector.low, detector.high)
    if kind == "depth":
        return depth_meter(lambda pictures: [detector.values(picture) for picture in pictures], str(detector))
    if kind == "pose":
        return pose_meter(lambda pictures: [detector.keypoints(picture) for picture in pictures], str(detector))
    sides = (examples.size,) if isinstance(examples, ToyboxExamples) else (examples.height, examples.width)
    return map_meter(kind, detector, str(detector), shortest=min(sides))
