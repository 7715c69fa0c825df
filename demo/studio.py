"""What the page can be asked for: the model, its limits, the maps that it reads, the pictures that it draws."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from scaleweaver.control_maps import detector_of
from scaleweaver.controls.base import Preprocessor, at_short_side
from scaleweaver.controls.openpose import to_json
from scaleweaver.controls.pose import Pose
from scaleweaver.demo.drawing import Drawn, Moment, Wish, draw
from scaleweaver.demo.encoded import open_picture, read_pose
from scaleweaver.images import fit
from scaleweaver.request import read_schedule
from scaleweaver.schedule import BUDGETS, RATIOS, ScaleSchedule, infinity_schedule

LABELS = {"canny": "Edges", "depth": "Depth", "pose": "Pose", "palette": "Colours", "softedge": "Soft edges"}


@dataclass(frozen=True)
class Limits:
    """How much one visitor may ask for. upload: size of a file, as gradio writes it; waiting: length of the queue."""

    prompt: int = 400
    pictures: int = 4
    controls: int = 3
    people: int = 20
    megapixels: int = 24
    upload: str = "10mb"
    waiting: int = 16
    gpu_seconds: int = 60


class Studio:
    """A pipeline that many visitors share: it is read by all and changed by none, and draws for one at a time."""

    def __init__(self, pipe: Any, limits: Limits | None = None) -> None:
        self.pipe = pipe
        self.limits = limits or Limits()
        self._turn, self._loading = threading.Lock(), threading.Lock()
        self._detectors: dict[str, Preprocessor] = {}
        self._draw = _on_borrowed_gpu(self._draw_here, self.limits.gpu_seconds)

    @property
    def kinds(self) -> list[str]:
        """Names of the controls that the model has."""
        return list(self.pipe.controls)

    @property
    def schedule(self) -> ScaleSchedule:
        """The model's own size."""
        return read_schedule(None, self.pipe.config["schedule"], None, None)

    @property
    def own_size(self) -> tuple[int, int]:
        """(height, width) of the model's own pictures."""
        return self.schedule.height, self.schedule.width

    @property
    def own_size_name(self) -> str:
        """The one of `sizes` that is the model's own."""
        return f"{self.schedule.width} x {self.schedule.height}"

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Name -> (height, width) of all that the model draws; a model of one size has one."""
        config = self.pipe.config["schedule"]
        if "grids" in config:
            return {self.own_size_name: self.own_size}
        budgets = [name for name, scales in BUDGETS.items() if scales <= BUDGETS[config["budget"]]]
        plans = [infinity_schedule(ratio, budget) for budget in reversed(budgets) for ratio in RATIOS]
        return {f"{plan.width} x {plan.height}": (plan.height, plan.width) for plan in plans}

    def size(self, name: str) -> tuple[int, int]:
        """(height, width) of one of `sizes`."""
        if name not in self.sizes:
            raise ValueError(f"{name!r} is no size of this model; choose one of the list")
        return self.sizes[name]

    def size_under(self, picture: Image.Image) -> tuple[int, int]:
        """(height, width) that a call draws under a control's picture, where nobody chose one."""
        plan = read_schedule(None, self.pipe.config["schedule"], None, None, (picture.height, picture.width))
        return plan.height, plan.width

    def label(self, kind: str) -> str:
        return LABELS.get(kind, kind.capitalize())

    def map_kind(self, kind: str) -> str:
        """What a control reads, whatever the name is that it was loaded under."""
        return str(self._config(kind).kind)

    @property
    def most_pixels(self) -> int:
        return self.limits.megapixels * 1_000_000

    def upload(self, path: str | None, name: str = "picture") -> Image.Image:
        """A visitor's file as RGB, refused by its header where it is too large."""
        if not path:
            raise ValueError(f"there is no {name} yet; upload one")
        return open_picture(path, name, self.most_pixels)

    def fitted(self, picture: Image.Image, size: tuple[int, int] | None = None, *, lines: bool = True) -> Image.Image:
        """A picture at a size (height, width) or the model's own, what sticks out cut off; `lines` as in `fit`."""
        return fit(picture, *(size or self.own_size), lines=lines)

    def map_of(self, kind: str, photo: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        """The control map of a photo, made as the control's training maps were."""
        side = self._config(kind).resolution
        picture = self.fitted(photo, size)
        return self._detector(kind, loaded=True)(at_short_side(picture, side) if side else picture)

    def skeletons(self, kind: str, record: str, size: tuple[int, int] | None = None) -> Image.Image:
        """A visitor's OpenPose JSON as the map of a control that reads poses."""
        return self._pose(kind).draw(read_pose(record, self.limits.people), size or self.own_size)

    def find_pose(self, kind: str, photo: Image.Image, size: tuple[int, int] | None = None) -> str:
        """The people of a photo as OpenPose JSON, without the joints that the detector is not sure of."""
        detector, picture = self._pose(kind, loaded=True), self.fitted(photo, size)
        points = detector.keypoints(picture)[: self.limits.people]  # (people, 18, 3)
        points[points[..., 2] <= detector.threshold] = 0
        if not points.any():
            raise ValueError("nobody was found in the photo; take another one, or start from a pose of the list")
        return json.dumps(to_json(points, (picture.height, picture.width)))

    def check_controls(self, count: int) -> None:
        """Refuse more controls than one drawing may have."""
        if count > self.limits.controls:
            raise ValueError(f"{count} controls were given; use at most {self.limits.controls}")

    def draw(self, wish: Wish) -> Iterator[Moment | Drawn]:
        """Draw a wish that was checked against the limits."""
        if not wish.prompt.strip():
            raise ValueError("the prompt is empty; write what to draw, or take an example")
        for name, words in (("prompt", wish.prompt), ("negative prompt", wish.options.get("negative_prompt", ""))):
            if len(words.strip()) > self.limits.prompt:
                raise ValueError(f"the {name} has {len(words.strip())} characters; write at most {self.limits.prompt}")
        if not 1 <= wish.count <= self.limits.pictures:
            raise ValueError(f"{wish.count} pictures were asked for; ask for 1 to {self.limits.pictures} at a time")
        self.check_controls(len(wish.controls))
        yield from self._draw(wish)

    def _draw_here(self, wish: Wish) -> Iterator[Moment | Drawn]:
        yield from draw(self.pipe, wish, self._turn)

    def _pose(self, kind: str, *, loaded: bool = False) -> Pose:
        detector = self._detector(kind, loaded=loaded)
        if not isinstance(detector, Pose):
            raise ValueError(f"{kind} reads no poses; choose a control that does")
        return detector

    def _detector(self, kind: str, *, loaded: bool = False) -> Preprocessor:
        """Kept, so that its network loads once, also where two visitors are the first; `loaded`: it is there."""
        with self._loading:
            if kind not in self._detectors:
                self._detectors[kind] = detector_of(self._config(kind))
            if loaded:
                getattr(self._detectors[kind], "network", None)  # the cached property of those that have one
        return self._detectors[kind]

    def _config(self, kind: str) -> Any:
        if kind not in self.pipe.controls:
            raise ValueError(f"there is no control {kind!r}; choose {', '.join(self.kinds) or 'none: it has none'}")
        return self.pipe.controls[kind].config


def _on_borrowed_gpu(function: Callable[..., Any], seconds: int) -> Callable[..., Any]:
    """The same function, which borrows a GPU for its time where the page is a Space with the package for that."""
    if importlib.util.find_spec("spaces") is None:
        return function
    import spaces

    return spaces.GPU(duration=seconds)(function)
