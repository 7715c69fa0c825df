"""Does a picture show what its prompt asks for? A small detector for the built-in world, and scores of what it finds.

Objects as Points (arXiv 1904.07850): one heat map per kind on a grid of 8-pixel cells whose peaks are the things found;
colour, pose and the place of the base are read at the peak, so two things of one kind stay two.
Differs from the paper: kinds compete in the suppression of neighbours, and the colour head is shared by all kinds, so
that it cannot prefer the pairs of kind and colour it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from torch import Tensor, nn

from scaleweaver.hub import built_in_folder
from scaleweaver.toybox.worlds import VERSION, check_same_world, world_of

STRIDE = 8  # pixels per cell of the heat maps
MOST_ITEMS = 6  # peaks read per picture; a scene holds three things
PERSON = "person"
FACTS = ("kind", "color", "count", "relation", "pose", "clothes", "ground", "sky", "all")


@dataclass(frozen=True)
class FoundItem:
    """A thing or person read from a picture; positions are fractions of its width and height, y down."""

    kind: str  # "person" for people
    color: str  # of a person: the shirt
    trousers: str | None  # people only
    pose: str | None  # people only
    x: float  # centre
    y: float
    base: float  # y of the point it stands on
    confidence: float


@dataclass(frozen=True)
class Judgement:
    """What the judge reads from one picture."""

    items: tuple[FoundItem, ...]
    ground: str
    sky: str
    world: int = VERSION  # the version whose names these are


class AttributeJudge(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Pictures of the built-in world -> the things in them, with colour, place, pose and clothes.

    The names it knows are saved with its weights: those of a version of the world unless they are given. `threshold`
    is the confidence from which a peak counts as a thing.
    """

    @register_to_config
    def __init__(
        self,
        kinds: Sequence[str] = (*world_of(VERSION).kinds, PERSON),
        colors: Sequence[str] = world_of(VERSION).colors,
        poses: Sequence[str] = world_of(VERSION).poses,
        grounds: Sequence[str] = world_of(VERSION).grounds,
        skies: Sequence[str] = world_of(VERSION).skies,
        widths: Sequence[int] = (32, 64, 96, 144, 192),
        threshold: float = 0.3,
        world: int = VERSION,
    ) -> None:
        super().__init__()
        stem, fine, cell, half, quarter = widths  # channels at 1/2, 1/4, 1/8 (the cells), 1/16 and 1/32 of the size
        self.down = nn.ModuleList(
            [
                nn.Sequential(_block(3, stem, 2), _block(stem, fine, 2)),
                nn.Sequential(_block(fine, cell, 2), _block(cell, cell)),
                nn.Sequential(_block(cell, half, 2), _block(half, half)),
                nn.Sequential(_block(half, quarter, 2), _block(quarter, quarter)),
            ]
        )
        self.up_half = nn.Conv2d(quarter, half, 1)
        self.up_cell = nn.Conv2d(half, cell, 1)
        self.fuse_half = _block(half, half)
        self.fuse_cell = nn.Sequential(_block(cell, cell), _block(cell, cell))
        self.sizes = {"heat": len(kinds), "color": len(colors), "trousers": len(colors), "pose": len(poses), "place": 3}
        self.cells = nn.Conv2d(cell, sum(self.sizes.values()), 1)
        self.whole_sizes = {"ground": len(grounds), "sky": len(skies)}
        self.whole = nn.Linear(cell + quarter, sum(self.whole_sizes.values()))
        with torch.no_grad():
            # hardly any cell holds a centre: start from that
            self.cells.bias[: len(kinds)].fill_(-3.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> logits and places.

        Per cell (B, *, H/8, W/8): "heat" of each kind, "color", "trousers", "pose", and "place": offset of the centre
        from the middle of the cell (x, y) and of the base (y), in cells. Per picture (B, *): "ground", "sky".
        """
        cell, pooled = self._trunk(images)
        out = dict(zip(self.sizes, self.cells(cell).split(list(self.sizes.values()), dim=1), strict=True))
        parts = self.whole(pooled).split(list(self.whole_sizes.values()), dim=1)
        return out | dict(zip(self.whole_sizes, parts, strict=True))

    def _trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the cells (B, cell, H/8, W/8) and of the whole picture (B, cell + quarter)."""
        features = [images]
        for stage in self.down:
            features.append(stage(features[-1]))
        _, _, cell, half, quarter = features  # at 1/8, 1/16, 1/32
        half = self.fuse_half(half + _doubled(self.up_half(quarter)))  # (B, *, H/16, W/16)
        cell = self.fuse_cell(cell + _doubled(self.up_cell(half)))  # (B, *, H/8, W/8)
        return cell, torch.cat([cell.mean((2, 3)), quarter.mean((2, 3))], dim=1)

    @classmethod
    def built_in(cls, device: str = "cpu") -> AttributeJudge:
        """The judge that ships with the package, in eval mode and float32."""
        folder = built_in_folder("judge")
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"this installation has no judge ({folder} is not there); pass the folder of one, trained with"
                ' "scaleweaver train recipes/toybox/judge.yaml"'
            )
        judge: AttributeJudge = cls.from_pretrained(folder)
        return judge.float().eval().to(device)

    @torch.inference_mode()
    def judge(self, pictures: NDArray[np.uint8], batch: int = 32) -> list[Judgement]:
        """Read pictures (B, H, W, 3) uint8; it was trained at 128 x 128."""
        found: list[Judgement] = []
        for images in self._batches(pictures, batch):
            found += self.read({name: value.float().cpu() for name, value in self(images).items()})
        return found

    @torch.inference_mode()
    def features(self, pictures: NDArray[np.uint8], batch: int = 32) -> NDArray[np.float32]:
        """What the judge makes of whole pictures (B, H, W, 3) uint8 before it names them, (B, F): averaged maps."""
        parts = [self._trunk(images)[1].float().cpu().numpy() for images in self._batches(pictures, batch)]
        return np.concatenate(parts)

    def _batches(self, pictures: NDArray[np.uint8], batch: int) -> Iterator[Tensor]:
        """Pictures as (b, 3, H, W) in [-1, 1] on the judge's device."""
        if pictures.ndim != 4 or pictures.shape[3] != 3 or any(side % 32 for side in pictures.shape[1:3]):
            raise ValueError(
                f"pictures of shape {pictures.shape}; expected (B, H, W, 3) with sides that are multiples of 32"
            )
        if pictures.dtype != np.uint8:
            raise ValueError(f"pictures are {pictures.dtype}; expected uint8 from 0 to 255")
        for start in range(0, len(pictures), batch):
            chunk = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch])).to(self.device)
            yield chunk.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1

    def read(self, out: Mapping[str, Tensor]) -> list[Judgement]:
        """What `forward` returned, as names and places."""
        names = self.config
        heat, kind = out["heat"].sigmoid().max(dim=1)  # (B, h, w) both
        peaks = heat * (heat == F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0])  # (B, h, w)
        height, width = peaks.shape[1:]
        judgements = []
        for b in range(len(peaks)):
            items = []
            best = peaks[b].flatten().topk(min(MOST_ITEMS, height * width))
            for confidence, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if confidence < names["threshold"]:
                    break
                row, column = divmod(at, width)
                here = {name: out[name][b, :, row, column] for name in ("color", "trousers", "pose", "place")}
                dx, dy, base = here["place"].tolist()
                person = names["kinds"][kind[b, row, column]] == PERSON
                items.append(
                    FoundItem(
                        kind=names["kinds"][kind[b, row, column]],
                        color=names["colors"][here["color"].argmax()],
                        trousers=names["colors"][here["trousers"].argmax()] if person else None,
                        pose=names["poses"][here["pose"].argmax()] if person else None,
                        x=(column + 0.5 + dx) / width,
                        y=(row + 0.5 + dy) / height,
                        base=(row + 0.5 + base) / height,
                        confidence=confidence,
                    )
                )
            ground, sky = names["grounds"][out["ground"][b].argmax()], names["skies"][out["sky"][b].argmax()]
            judgements.append(Judgement(tuple(items), ground, sky, names["world"]))
        return judgements


def score(judgements: Sequence[Judgement], attributes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the facts asked for that were found, over all pictures: {"kind", "color", "count", "relation", ...}.

    `attributes` is what `toybox.scene.attributes` says of each scene, and the prompt must have said all of it
    (`prompts.explicit_caption`). A fact about a thing that was not found counts as wrong. "all": pictures in which
    every fact is right, apart from ground and sky. Names of which nothing was asked are left out.
    """
    if len(judgements) != len(attributes):
        raise ValueError(f"{len(judgements)} judgements for {len(attributes)} scenes; pass one each")
    return shares([facts(one, asked) for one, asked in zip(judgements, attributes, strict=True)])


def facts(judgement: Judgement, asked: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Which of the facts asked of one picture were found, by name; see `score`."""
    check_same_world("the judge", judgement.world, asked)
    best = max(_readings(judgement.items, asked), key=lambda reading: sum(sum(f) for f in reading.values()))
    best["count"] = [len(judgement.items) == asked["count"]]
    best["all"] = [all(right for rights in best.values() for right in rights)]
    best["ground"], best["sky"] = [judgement.ground == asked["ground"]], [judgement.sky == asked["sky"]]
    return best


def shares(pictures: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Share of right ones among the `facts` of all pictures together, by name."""
    all_of = {name: [right for found in pictures for right in found.get(name, ())] for name in FACTS}
    return {name: float(np.mean(rights)) for name, rights in all_of.items() if rights}


def _readings(found: Sequence[FoundItem], asked: Mapping[str, Any]) -> list[dict[str, list[bool]]]:
    """The facts of a picture under every way of telling which found item is which asked one."""
    wanted = asked["items"]
    kinds = [item["kind"] if item["type"] == "thing" else PERSON for item in wanted]
    options = [[None, *(n for n, item in enumerate(found) if item.kind == kind)] for kind in kinds]
    readings = []
    for choice in product(*options):
        taken = [n for n in choice if n is not None]
        if len(set(taken)) < len(taken):
            continue
        chosen = [None if n is None else found[n] for n in choice]
        facts: dict[str, list[bool]] = {name: [] for name in ("kind", "color", "relation", "pose", "clothes")}
        for item, want in zip(chosen, wanted, strict=True):
            facts["kind"].append(item is not None)
            if want["type"] == "thing":
                facts["color"].append(item is not None and item.color == want["color"])
            else:
                facts["pose"].append(item is not None and item.pose == want["pose"])
                facts["clothes"].append(item is not None and item.color == want["shirt"])
                facts["clothes"].append(item is not None and item.trousers == want["trousers"])
        facts["relation"] = [related(chosen[i], relation, chosen[j]) for i, relation, j in asked["relations"]]
        readings.append(facts)
    return readings


def related(one: FoundItem | None, relation: str, other: FoundItem | None) -> bool:
    """Whether two found items stand so: left and right by their centres, depth by their bases, higher is farther."""
    if one is None or other is None:
        return False
    if relation in ("left of", "right of"):
        return one.x < other.x if relation == "left of" else one.x > other.x
    if relation in ("behind", "in front of"):
        return one.base < other.base if relation == "behind" else one.base > other.base
    if relation == "on top of":
        return one.base < other.y and abs(one.x - other.x) < 0.12
    raise ValueError(f'relation "{relation}" is unknown; expected left of, right of, behind, in front of or on top of')


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, out), nn.SiLU())


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
