"""Control fidelity of a pipeline: the same scenes under the control, without it, under a wrong one, and the bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaleweaver.contracts import Control
from scaleweaver.evaluate.examples import Example, Examples, partner
from scaleweaver.evaluate.meters import Meter
from scaleweaver.evaluate.record import Record
from scaleweaver.evaluate.report import Card, Outcome, Panel
from scaleweaver.request import read_schedule
from scaleweaver.schedule import ScaleSchedule
from scaleweaver.train.data import fingerprint
from scaleweaver.train.tokenizer import reconstruct

Pixels = NDArray[np.uint8]
Baseline = Literal["no-control", "mismatched", "reconstruction"]
BASELINES: tuple[Baseline, ...] = ("no-control", "mismatched", "reconstruction")
CALL = ("guidance_scale", "control_guidance_scale", "temperature", "top_k", "top_p")
TRUE = "true pictures"
NOTES = {
    "strength": "drawn under their own map at this strength",
    "no control": "the same prompts and seeds without a map, measured against the same maps",
    "mismatched": "drawn under, and measured against, the map of another scene, which the prompt contradicts",
    "chance": "pictures of the first strength against the map of another scene, which they were not given",
    "reconstruction": "the true pictures through the tokenizer: what a perfect transformer could reach",
    TRUE: "the true pictures themselves: the meter's own mistakes",
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """Which pictures a row holds and whose map they are measured against.

    strength None is without control; `wrong` draws under the partner's map; `judged_wrong` measures against it.
    """

    name: str
    source: Literal["drawn", "reconstruction", "reference", "again"] = "drawn"
    strength: float | None = None
    wrong: bool = False
    judged_wrong: bool = False
    again: str = ""  # the row whose pictures these are

    @property
    def drawn(self) -> bool:
        """Whether there is one picture per seed, not one per scene."""
        return self.source in ("drawn", "again")


def rows_of(strengths: Sequence[float], baselines: Sequence[str]) -> list[Row]:
    """The rows of a table, best known first, bounds last."""
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {', '.join(unknown)}; pass some of {', '.join(BASELINES)}")
    if not strengths or any(strength <= 0 for strength in strengths):
        raise ValueError(f"strengths {list(strengths)}; pass at least one, each above 0, as in 1.0,0.5")
    rows = [Row(f"strength {strength:g}", strength=strength) for strength in strengths]
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"strengths {list(strengths)} hold one twice; pass each once")
    if "no-control" in baselines:
        rows.append(Row("no control"))
    if "mismatched" in baselines:
        rows.append(Row("mismatched", strength=strengths[0], wrong=True, judged_wrong=True))
        rows.append(Row("chance", "again", judged_wrong=True, again=rows[0].name))
    if "reconstruction" in baselines:
        rows.append(Row("reconstruction", "reconstruction"))
    return [*rows, Row(TRUE, "reference")]


def evaluate_control(
    pipe: Any,
    examples: Examples,
    meter: Meter,
    out: Path,
    *,
    name: str | None = None,
    count: int = 200,
    strengths: Sequence[float] = (1.0, 0.5),
    baselines: Sequence[str] = BASELINES,
    seed: int = 0,
    images_per_prompt: int = 1,
    batch: int = 16,
    call: Mapping[str, Any] | None = None,
    shown: int = 12,
    on_progress: Progress | None = None,
) -> Outcome:
    """Draw, measure and keep everything in the folder `out`; returns the results, which `report.write` shows.

    `name` is the control's name in the pipeline, by default the meter's kind. Picture i of a prompt has the seed
    `seed + prompt * images_per_prompt + i`, so a larger `count` extends an earlier run; other weights or settings in
    the same folder are refused. `batch` pictures are drawn at once.
    """
    name = name or meter.kind
    if name not in pipe.available_controls:
        loaded = ", ".join(pipe.available_controls) or "none"
        raise ValueError(f'the model has no control "{name}"; there is {loaded}: load it, or pass the name of another')
    if count < 1 or images_per_prompt < 1 or batch < 1:
        raise ValueError(f"count {count}, images per prompt {images_per_prompt} and batch {batch} must be at least 1")
    if examples.limit is not None and count > examples.limit:
        raise ValueError(f"{count} examples are asked for and there are {examples.limit}; pass a smaller count")
    rows = rows_of(strengths, baselines)
    if examples.limit == 1 and any(row.wrong for row in rows):
        raise ValueError("the baseline mismatched needs the map of another example and there is one; leave it out")
    settings: dict[str, Any] = {"task": "control", "kind": meter.kind, "control": name, "meter": meter.source}
    settings["first strength"] = strengths[0]  # that of the baselines
    settings |= model_settings(pipe, [name], call) | examples.settings
    settings |= {"metrics": [c.name for c in meter.columns], "seed": seed, "images_per_prompt": images_per_prompt}
    record = Record(out, settings)
    drawing = Drawing(pipe, seed, images_per_prompt, batch, call or {})

    for numbers in chunks(count, max(1, batch // images_per_prompt)):
        if on_progress is not None:
            on_progress(numbers[0], count)
        open_rows = [row for row in rows if record.row(row.name).missing(drawing.keys(numbers, row.drawn))]
        if not open_rows:
            continue
        others = [partner(number, examples.limit) for number in numbers]
        wanted = sorted({*numbers, *others}) if any(row.wrong or row.judged_wrong for row in open_rows) else numbers
        found = dict(zip(wanted, examples.read(wanted), strict=True))
        pairs = [(found[own], found.get(other, found[own])) for own, other in zip(numbers, others, strict=True)]
        for row in open_rows:
            measure_row(record, row, drawing, meter, name, pairs)
    if on_progress is not None:
        on_progress(count, count)
    results: dict[str, Any] = {"model": str(pipe.name_or_path), "settings": settings | {"count": count}}
    results["columns"] = [vars(column) for column in meter.columns]
    results |= {"row_notes": {row.name: NOTES[row.name if row.name in NOTES else "strength"] for row in rows}}
    results |= {"main": meter.main, "rows": summaries(record, rows, drawing, meter, count)}
    return Outcome(results, _panels(record, rows[0], drawing, meter, count, shown), rows[0].name)


def measure_row(
    record: Record,
    row: Row,
    drawing: Drawing,
    meter: Meter,
    name: str,
    pairs: Sequence[tuple[Example, Example]],
) -> None:
    """Pictures and scores of one row for some examples, each beside its partner, as far as they are missing."""
    kept, kind = record.row(row.name), meter.kind
    todo = [(own, other) for own, other in pairs if kept.missing(drawing.keys([own.number], row.drawn))]
    keys = drawing.keys([own.number for own, _ in todo], row.drawn)
    each = drawing.images_per_prompt if row.drawn else 1
    shown = [other if row.wrong else own for own, other in todo for _ in range(each)]
    judged = [other if row.judged_wrong else own for own, other in todo for _ in range(each)]
    owners = [own for own, _ in todo]
    if row.source == "drawn":
        maps = None if row.strength is None else [example.maps[kind] for example in shown]
        control = None if maps is None else Control(name, maps, scale=row.strength or 0.0)
        pictures = drawing.draw([own.prompt for own in owners for _ in range(each)], keys, control)
    elif row.source == "again":
        pictures = np.stack([record.row(row.again).picture(key) for key in keys])
    else:
        pictures = np.stack([own.reference for own in owners])
        if row.source == "reconstruction":
            pictures = reconstruct(drawing.pipe.vae, pictures, drawing.schedule)
    scores = meter.measure(pictures, [example.targets[kind] for example in judged])
    for key, picture, score, example in zip(keys, pictures, scores, shown, strict=True):
        saved = {} if row.source == "again" else {"picture": picture}
        if row.source == "reference":
            saved["map"] = example.maps[kind]
            score["prompt"] = example.prompt
        kept.write(key, score, **saved)


class Drawing:
    """The pipeline with the seeds, sizes and call settings of one evaluation."""

    def __init__(self, pipe: Any, seed: int, images_per_prompt: int, batch: int, call: Mapping[str, Any]) -> None:
        self.pipe, self.seed, self.images_per_prompt = pipe, seed, images_per_prompt
        self.batch, self.call = batch, dict(call)
        height, width = self.call.get("height"), self.call.get("width")
        self.schedule: ScaleSchedule = read_schedule(None, pipe.config["schedule"], height, width)

    def keys(self, numbers: Sequence[int], drawn: bool) -> list[int]:
        """Numbers of the pictures of some examples: one per seed where they are drawn."""
        if not drawn:
            return list(numbers)
        return [number * self.images_per_prompt + i for number in numbers for i in range(self.images_per_prompt)]

    def draw(self, prompts: Sequence[str], keys: Sequence[int], control: Control | None) -> Pixels:
        """(B, H, W, 3): a picture per prompt, with the seed of its key; a control has a list of one image each."""
        parts = []
        for start in range(0, len(keys), self.batch):
            some = slice(start, start + self.batch)
            own = None if control is None else replace(control, image=control.image[some])
            seeds = [self.seed + key for key in keys[some]]
            images = self.pipe(list(prompts[some]), control=own, seed=seeds, output_type="np", **self.call).images
            parts.append(np.asarray((images * 255).round(), np.uint8))
        return np.concatenate(parts)


def model_settings(pipe: Any, controls: Sequence[str], call: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the pictures depend on: weights by fingerprint, number format, and the numbers of every call."""
    networks = {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "vae")}
    networks |= {name: pipe.controls[name] for name in controls}
    weights = {name: fingerprint(network) for name, network in networks.items() if network is not None}
    values = {name: pipe.config.get(name) for name in CALL} | dict(call or {})
    return {"weights": weights, "dtype": str(pipe.dtype).removeprefix("torch."), "call": values}


def chunks(count: int, size: int) -> list[range]:
    """range(count) in parts of even length, so that partners are read together."""
    size += size % 2
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def summaries(record: Record, rows: Sequence[Row], drawing: Drawing, meter: Meter, count: int) -> dict[str, Any]:
    """{row: {"pictures": how many, a mean and a standard error per column}}."""
    result: dict[str, Any] = {}
    for row in rows:
        scores = record.row(row.name).scores
        groups = [[scores[key] for key in drawing.keys([number], row.drawn)] for number in range(count)]
        result[row.name] = {"pictures": sum(map(len, groups))} | meter.summarise(groups)
    return result


def _panels(record: Record, row: Row, drawing: Drawing, meter: Meter, count: int, shown: int) -> list[Panel]:
    """The first pictures and the worst ones of a row, each between its map and the true picture."""
    column = next(column for column in meter.columns if column.name == meter.main)
    kept, truth = record.row(row.name), record.row(TRUE)
    keys = [key for key in drawing.keys(range(count), row.drawn) if kept.scores[key].get(column.name) is not None]

    def value(key: int) -> float:
        return float(kept.scores[key][column.name])

    def card(key: int) -> Card:
        number = key // drawing.images_per_prompt
        pictures = [
            (meter.kind, truth.picture(number, "map")),
            ("result", kept.picture(key)),
            ("reference", truth.picture(number)),
        ]
        score = f"{column.title} {value(key):.{column.digits}f} · scene {number}, seed {drawing.seed + key}"
        return Card(pictures, truth.scores[number]["prompt"], score)

    worst = sorted(keys, key=value, reverse=not column.higher)[:shown]
    return [
        Panel("The first ones", f"{row.name}, not chosen", [card(key) for key in keys[:shown]]),
        Panel("The worst ones", f"by {column.title}", [card(key) for key in worst]),
    ]
