"""Pictures of a pipeline as pictures: do they show what was asked for, and do they look like the true ones?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaleweaver.contracts import Control
from scaleweaver.evaluate.attributes import FACTS, AttributeJudge, facts, shares
from scaleweaver.evaluate.examples import Examples, partner
from scaleweaver.evaluate.fidelity import TRUE, Drawing, Progress, Row, chunks, model_settings
from scaleweaver.evaluate.frechet import ClipAgreement, FeatureExtractor, InceptionDistance, diversity, frechet_distance
from scaleweaver.evaluate.meters import Column
from scaleweaver.evaluate.record import Record
from scaleweaver.evaluate.report import Card, Outcome, Panel
from scaleweaver.toybox.worlds import check_same_world
from scaleweaver.train.data import fingerprint
from scaleweaver.train.tokenizer import reconstruct

Pixels = NDArray[np.uint8]
Keys = Mapping[str, Sequence[int]]  # row -> numbers of its pictures
TITLES = {"color": "colour", "all": "everything"}
MEANINGS = {
    "kind": "things and people asked for that the judge found",
    "color": "of the things",
    "count": "pictures with as many things as asked for",
    "relation": "left of, right of, behind, in front of, on top of",
    "pose": "of the people",
    "clothes": "colours of shirt and trousers",
    "ground": "grass, sand, snow, ...",
    "sky": "noon, dusk, night, ...",
    "all": "pictures in which all of this is right, apart from ground and sky",
}
OTHERS = "other true pictures"
NOTES = {
    "prompts": "drawn from the prompts alone",
    "under": "drawn under the scene's control map too",
    "other prompts": "the first row judged by the prompt of another scene: chance",
    "reconstruction": "the true pictures through the tokenizer",
    TRUE: "the true pictures, where the judge's own mistakes show",
    OTHERS: "as many true pictures of other scenes: the distance that sampling alone makes",
}


@dataclass(frozen=True)
class Metrics:
    """What is measured besides: distances by features, and real FID and CLIP score where they were asked for."""

    judge: AttributeJudge | None = None
    features: Sequence[FeatureExtractor] = ()
    fid: bool = False
    clip: str | None = None  # Hub id or folder of a CLIP model
    device: str = "cpu"


def evaluate_quality(
    pipe: Any,
    examples: Examples,
    out: Path,
    metrics: Metrics,
    *,
    controls: Sequence[str] = (),
    count: int = 200,
    seed: int = 0,
    images_per_prompt: int = 1,
    batch: int = 16,
    call: Mapping[str, Any] | None = None,
    shown: int = 12,
    on_progress: Progress | None = None,
) -> Outcome:
    """Draw, judge and keep everything in the folder `out`, going on where an earlier call stopped; returns the results.

    `controls` are names of the pipeline's controls that are kinds of the examples' maps too. `batch` pictures are drawn
    at once.
    """
    missing = [name for name in controls if name not in pipe.available_controls]
    if missing:
        loaded = ", ".join(pipe.available_controls) or "none"
        raise ValueError(f"the model has no control {', '.join(missing)}; there is {loaded}")
    if count < 2 or images_per_prompt < 1 or batch < 1:
        raise ValueError(f"count {count}, images per prompt {images_per_prompt}, batch {batch}; pass at least 2, 1, 1")
    if examples.limit is not None and count > examples.limit:
        raise ValueError(f"{count} examples are asked for and there are {examples.limit}; pass a smaller count")
    if metrics.judge is not None and examples.world is not None:
        check_same_world("the judge", metrics.judge.config["world"], examples.world)
    # asked for first: a missing package or download must not show after hours of drawing
    fid = InceptionDistance(metrics.device) if metrics.fid else None
    clip = ClipAgreement(metrics.clip, metrics.device) if metrics.clip else None
    rows = [Row("prompts"), *(Row(f"prompts and {name}", strength=1.0, again=name) for name in controls)]
    rows += [Row("reconstruction", "reconstruction"), Row(TRUE, "reference")]
    if examples.limit is None or examples.limit >= 2 * count:
        rows.append(Row(OTHERS, "reference", wrong=True))
    judged = "none" if metrics.judge is None else fingerprint(metrics.judge)
    settings: dict[str, Any] = {
        "task": "quality",
        "judge": judged,
        "seed": seed,
        "images_per_prompt": images_per_prompt,
    }
    settings |= model_settings(pipe, controls, call) | examples.settings
    record = Record(out, settings)
    drawing = Drawing(pipe, seed, images_per_prompt, batch, call or {})
    for numbers in chunks(count, max(1, batch // images_per_prompt)):
        if on_progress is not None:
            on_progress(numbers[0], count)
        for row in rows:
            these = [number + count for number in numbers] if row.wrong else numbers
            if record.row(row.name).missing(drawing.keys(these, row.drawn)):
                _judge_row(record, row, drawing, metrics.judge, examples, these)
    if on_progress is not None:
        on_progress(count, count)
    results: dict[str, Any] = {"model": str(pipe.name_or_path), "settings": settings | {"count": count}}
    results |= _summaries(record, rows, drawing, metrics, count, fid=fid, clip=clip)
    return Outcome(results, _panels(record, rows, drawing, count, shown), rows[0].name)


def _judge_row(
    record: Record,
    row: Row,
    drawing: Drawing,
    judge: AttributeJudge | None,
    examples: Examples,
    numbers: Sequence[int],
) -> None:
    """Pictures of one row for some examples, and the facts that the judge finds in them."""
    kept = record.row(row.name)
    todo = [number for number in numbers if kept.missing(drawing.keys([number], row.drawn))]
    found = examples.read(todo)
    keys = drawing.keys(todo, row.drawn)
    each = [example for example in found for _ in range(drawing.images_per_prompt if row.drawn else 1)]
    if row.source == "drawn":
        control = Control(row.again, [e.maps[row.again] for e in each], scale=1.0) if row.again else None
        pictures = drawing.draw([e.prompt for e in each], keys, control)
    else:
        pictures = np.stack([e.reference for e in each])
        if row.source == "reconstruction":
            pictures = reconstruct(drawing.pipe.vae, pictures, drawing.schedule)
    scores: list[dict[str, Any]] = [{"prompt": e.prompt} for e in each]
    if judge is not None and not row.wrong and all(e.asked is not None for e in each):
        judgements = judge.judge(pictures)
        for judgement, example, entry in zip(judgements, each, scores, strict=True):
            entry["facts"] = facts(judgement, example.asked or {})
        if row.name == "prompts":  # the same pictures, judged by the prompts of other scenes
            others = dict(zip(todo, examples.read([partner(n, examples.limit) for n in todo]), strict=True))
            for judgement, example, entry in zip(judgements, each, scores, strict=True):
                entry["other facts"] = facts(judgement, others[example.number].asked or {})
    for key, picture, entry in zip(keys, pictures, scores, strict=True):
        kept.write(key, entry, picture=picture)


def _summaries(
    record: Record,
    rows: Sequence[Row],
    drawing: Drawing,
    metrics: Metrics,
    count: int,
    *,
    fid: InceptionDistance | None,
    clip: ClipAgreement | None,
) -> dict[str, Any]:
    """Columns and rows of the table."""
    keys = {row.name: drawing.keys(range(count), row.drawn) for row in rows}
    keys |= {row.name: list(range(count, 2 * count)) for row in rows if row.wrong}
    table = _facts_found(record, keys)
    asked = [name for name in FACTS if any(name in values for values in table.values())]
    columns = [Column(name, TITLES.get(name, name), True, note=MEANINGS[name]) for name in asked]
    for extractor in metrics.features:
        columns += _add_distances(table, record, keys, extractor, drawing.images_per_prompt)
    if fid is not None:
        for name in keys.keys() - {TRUE}:
            table[name]["fid"] = _inception(record, fid, keys, name)
        columns.append(Column("fid", "FID", False, 2, "on Inception's features"))
    if clip is not None:
        for name in keys:
            table[name]["clip"] = _agreement(record, clip, keys, name)
        columns.append(Column("clip", "CLIP score", True, 2, f"100 times the cosine of {metrics.clip}"))
    notes = {name: NOTES[name if name in NOTES else "under"] for name in table}
    shown = list({column.name: vars(column) for column in columns}.values())  # diversity comes once
    return {"columns": shown, "main": asked[-1] if asked else "", "row_notes": notes, "rows": table}


def _facts_found(record: Record, keys: Keys) -> dict[str, dict[str, Any]]:
    """Rows with the number of pictures and the shares of facts found, chance after the row that it is from."""
    table: dict[str, dict[str, Any]] = {}
    for name, wanted in keys.items():
        scores = [record.row(name).scores[key] for key in wanted]
        table[name] = {"pictures": len(scores)} | shares([s["facts"] for s in scores if "facts" in s])
        other = [s["other facts"] for s in scores if "other facts" in s]
        if other:
            table["other prompts"] = {"pictures": len(other)} | shares(other)
    return table


def _add_distances(
    table: dict[str, dict[str, Any]], record: Record, keys: Keys, extractor: FeatureExtractor, images_per_prompt: int
) -> list[Column]:
    """Frechet distances of all rows to the true pictures, and how the pictures of a prompt differ."""
    each = {
        name: np.concatenate([extractor.features(pictures) for pictures in _pictures(record, keys, name)])
        for name in keys
    }
    truth, title = each[TRUE], extractor.title
    for name in keys.keys() - {TRUE}:
        table[name][title.lower()] = frechet_distance(each[name], truth)
    note = f"Frechet distance to {len(truth)} true pictures by {truth.shape[1]} features"
    note += ", which are too many for so few: biased upwards" if len(truth) <= truth.shape[1] else ""
    columns = [Column(title.lower(), title, False, 2, note)]
    if images_per_prompt > 1:
        for name in (name for name in keys if name.startswith("prompts")):
            table[name]["diversity"] = diversity(each[name].reshape(len(truth), images_per_prompt, -1))
        columns.append(
            Column("diversity", "diversity", True, note="mean cosine distance of the features of a prompt's pictures")
        )
    return columns


def _pictures(record: Record, keys: Keys, name: str, size: int = 64) -> Iterator[Pixels]:
    """Pictures of a row in batches (b, H, W, 3)."""
    for start in range(0, len(keys[name]), size):
        yield np.stack([record.row(name).picture(key) for key in keys[name][start : start + size]])


def _inception(record: Record, fid: InceptionDistance, keys: Keys, name: str) -> float:
    """FID of a row against the true pictures."""
    fid.metric.reset()
    for source in (TRUE, name):
        for batch in _pictures(record, keys, source):
            fid.add(batch, real=source == TRUE)
    return fid.value()


def _agreement(record: Record, clip: ClipAgreement, keys: Keys, name: str) -> float:
    """CLIP score of a row."""
    clip.metric.reset()
    done = 0
    for batch in _pictures(record, keys, name):
        some = keys[name][done : done + len(batch)]
        clip.add(batch, [record.row(name).scores[key]["prompt"] for key in some])
        done += len(batch)
    return clip.value()


def _panels(record: Record, rows: Sequence[Row], drawing: Drawing, count: int, shown: int) -> list[Panel]:
    """The first pictures, and those in which the judge found the smallest share of what was asked for."""
    drawn = [row for row in rows if row.source == "drawn"]
    lead, truth = record.row(drawn[0].name), record.row(TRUE)

    def share(key: int) -> float:
        return float(np.mean([right for rights in lead.scores[key]["facts"].values() for right in rights]))

    def card(key: int) -> Card:
        number, seed = key // drawing.images_per_prompt, drawing.seed + key
        pictures = [(row.name.removeprefix("prompts and "), record.row(row.name).picture(key)) for row in drawn]
        found = f"{share(key):.0%} of the facts found · " if "facts" in lead.scores[key] else ""
        score = f"{found}scene {number}, seed {seed}"
        return Card([*pictures, ("reference", truth.picture(number))], lead.scores[key]["prompt"], score)

    keys = drawing.keys(range(count), True)
    panels = [Panel("The first ones", "not chosen", [card(key) for key in keys[:shown]])]
    if all("facts" in lead.scores[key] for key in keys):
        worst = [card(key) for key in sorted(keys, key=share)[:shown]]
        panels.append(Panel("The worst ones", "by the share of facts found", worst))
    return panels
