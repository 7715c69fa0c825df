"""Model cards: README.md of a saved pipeline or control, with the front matter by which the Hub finds it.

A card is written from what lies in the folder (sizes, grids, how a control works), from a `Card` with what only people
know, and from the folders that `scaleweaver evaluate` and `scaleweaver train` left. No other number gets into it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from safetensors import safe_open

from scaleweaver.card_files import is_hub_id
from scaleweaver.images import read_image
from scaleweaver.metadata import read_settings, write_settings

MODEL_FILE, CONTROL_FILE = "model_index.json", "control_config.json"
_SHOWN_SETTINGS = ("steps", "batch", "accumulate", "lr", "optimizer", "precision", "ema", "seed")


@dataclass(frozen=True)
class Card:
    """What a card says that the weights do not; everything is optional.

    license: the Hub's name for it, such as "apache-2.0"; licenses: of single parts, `{"vae": "mit", "data": "cc0"}`.
    base_model: Hub id; of a control the pipeline's own name where that is one. pictures: what this package drew, whose
    prompts are read out of the pictures, or pairs (prompt, picture); the Hub shows them as a gallery. measured: folders
    that `scaleweaver evaluate` wrote. run: folder of the training run. limits: what it cannot do.
    """

    summary: str = ""
    license: str | None = None
    licenses: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    datasets: Sequence[str] = ()
    language: str | None = None
    tags: Sequence[str] = ()
    pictures: Sequence[Any] = ()
    measured: Sequence[str | os.PathLike[str]] = ()
    run: str | os.PathLike[str] | None = None
    limits: str = ""


def write_card(folder: Path, card: Card, *, name: str, base: str | None = None) -> None:
    """Write README.md of a saved pipeline or control, with its pictures in `images/`, over what is there.

    name: by which others will load it: the repository, or the folder. base: of a control, the pipeline that it fits.
    """
    if (folder / CONTROL_FILE).is_file():
        data, parts = _control(folder, card, name, card.base_model or base)
    elif (folder / MODEL_FILE).is_file():
        data, parts = _pipeline(folder, card, name)
    else:
        raise ValueError(f"{folder} holds neither {MODEL_FILE} nor {CONTROL_FILE}; save a pipeline or a control there")
    pictures = _save_pictures(folder, card.pictures)
    if pictures:
        data["widget"] = [{"text": prompt, "output": {"url": url}} for prompt, url in pictures if prompt]
    results = [result for source in card.measured for result in _results(Path(source))]
    if results:
        data.eval_results, data.model_name = results, name.rpartition("/")[2]
    gallery = "\n\n".join(f"![{prompt or 'a sample'}]({url})\n\n{prompt}" for prompt, url in pictures)
    sections = {
        "Pictures": gallery,
        **parts,
        "Training": _training(folder, Path(card.run)) if card.run is not None else "",
        "Measured": "\n\n".join(_table(Path(source)) for source in card.measured),
        "Limits": card.limits or _limits(parts),
        "Licence": _licence(card),
    }
    head = sections.pop("")
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text.strip())
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{head}\n\n{body}\n").save(folder / "README.md")


def _pipeline(folder: Path, card: Card, name: str) -> tuple[ModelCardData, dict[str, str]]:
    index = _json(folder / MODEL_FILE)
    controls = sorted(file.parent.name for file in folder.glob(f"controls/*/{CONTROL_FILE}"))
    size, grids = _plan(index.get("schedule") or {})
    rows = [
        (f"`{part.relative_to(folder).as_posix()}`", _kind_of(part), *_weights(part))
        for part in [*sorted(folder.iterdir()), *(folder / "controls" / control for control in controls)]
        if part.is_dir() and any(part.glob("*.safetensors"))
    ]
    call = f',\n    control={{"{controls[0]}": "map.png"}},  # or one of {", ".join(controls)}' if controls else ","
    head = f"""{card.summary or "A visual autoregressive (next-scale) text-to-image model."}

```python
from scaleweaver import VARControlPipeline

pipe = VARControlPipeline.from_pretrained({json.dumps(name)})
out = pipe(
    "your prompt"{call}
    seed=7,
)
out.images[0].save("out.png")  # prompt, seed and settings are inside the file
```

It needs the package `scaleweaver`; weights are safetensors."""
    defaults = ("guidance_scale", "control_guidance_scale", "temperature", "top_k", "top_p")
    facts = [
        *(("picture", size), ("scales", grids)),
        *((value, str(index[value])) for value in defaults if index.get(value) is not None),
        ("controls", ", ".join(controls) or "none"),
    ]
    parts = {
        "": head,
        "Parts": _rows(("part", "what", "parameters", "number format"), rows),
        "A call, unless told otherwise": _rows(("setting", "value"), facts),
    }
    tags = ["text-to-image", "visual-autoregressive", "next-scale-prediction", "scaleweaver", "safetensors"]
    tags += ["controlnet", *controls] if controls else []
    return _front_matter(card, tags, card.base_model, None), parts


def _control(folder: Path, card: Card, name: str, base: str | None) -> tuple[ModelCardData, dict[str, str]]:
    saved = _json(folder / CONTROL_FILE)
    config, backbone = saved["config"], saved["backbone"]
    kind = config["kind"]
    if base and not is_hub_id(base):
        base = Path(base).name  # where it lies on this machine is nobody's business
    numbers, form = _weights(folder)
    inside = folder.parent.name == "controls" and (folder.parents[1] / MODEL_FILE).is_file()
    load = "" if inside else f"\npipe.load_control({json.dumps(name)}, name={json.dumps(kind)}, replace=True)"
    fits = f"those of `{base}`" if base else f"a {backbone['class']} of depth {backbone['depth']}"
    head = f"""{card.summary or f"A ScaleWeaver control of the kind {kind!r}."}
It fits the weights that it was trained with, {fits}, and no others.

```python
from scaleweaver import VARControlPipeline
from scaleweaver.control_maps import map_of_photo

pipe = VARControlPipeline.from_pretrained({json.dumps(base or "the model it was trained for")}){load}
control = map_of_photo("photo.jpg", pipe.controls[{json.dumps(kind)}].config)  # made as those of the training
out = pipe("your prompt", control={{{json.dumps(kind)}: control}}, seed=7)
out.images[0].save("out.png")
```

It needs the package `scaleweaver`; the LoRA is in PEFT's format."""
    maps = [config.get("detector") or "detector not recorded"]
    maps += [f"thresholds {', '.join(map(str, config['thresholds']))}"] if config.get("thresholds") else []
    maps += [f"{config['resolution']} px"] if config.get("resolution") else []
    facts = [
        ("control maps", "; ".join(maps)),
        ("backbone", ", ".join(f"{key} {value}" for key, value in backbone.items())),
        ("blocks that read it", ", ".join(map(str, config.get("inject_blocks") or ()))),
        ("parameters", f"{numbers}, {form}"),
        ("LoRA on the condition stream", f"rank {config['lora_rank']} on {', '.join(config['lora_targets'])}"),
        ("fusion, scope", f"{config['fusion']}, {config['scope']}"),
        ("condition tokens, modulation", f"{config['condition_tokens']}, {config['condition_modulation']}"),
    ]
    about = (
        "The control image runs once through the backbone as a stream of tokens of its own; the image reads its keys"
        " and values through a projection that started at zero. A reimplementation of the mechanism of ScaleWeaver"
        " (arXiv 2510.14882); what is inferred is listed in `scaleweaver/methods/scaleweaver.py`."
    )
    parts = {"": head, "How it works": f"{about}\n\n{_rows(('', ''), facts)}"}
    tags = ["text-to-image", "visual-autoregressive", "scaleweaver", "controlnet", "lora", "safetensors", kind]
    return _front_matter(card, tags, base if base and is_hub_id(base) else None, "adapter"), parts


def _front_matter(card: Card, tags: Sequence[str], base_model: str | None, relation: str | None) -> ModelCardData:
    return ModelCardData(
        license=card.license,
        library_name="scaleweaver",
        pipeline_tag="text-to-image",
        language=card.language,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=list(card.datasets) or None,
        tags=[*tags, *card.tags],
    )


def _save_pictures(folder: Path, pictures: Sequence[Any]) -> list[tuple[str, str]]:
    """Prompt and place of every picture, written as PNG with the settings that it carries."""
    saved = []
    for number, item in enumerate(pictures):
        prompt, source = item if isinstance(item, tuple) else ("", item)
        picture = read_image(source, f"picture {number} of the card")
        settings = _settings(source) if isinstance(source, str | os.PathLike | Image.Image) else {}
        prompt = prompt or str(settings.get("prompt", ""))
        if settings and type(source) is not Image.Image:  # a crop or a copy is not what they would make
            picture = write_settings(picture, settings)
        place = PurePosixPath("images", f"{number:03d}.png")
        (folder / place).parent.mkdir(exist_ok=True)
        picture.save(folder / place)
        saved.append((" ".join(prompt.split()), str(place)))
    return saved


def _settings(source: Any) -> dict[str, Any]:
    try:
        return read_settings(source)
    except ValueError:
        return {}  # a picture of another origin has none, and is shown without a prompt


def _results(source: Path) -> Iterable[EvalResult]:
    """The first row of an evaluation, column by column."""
    found = _evaluation(source)
    settings, row = found["settings"], next(iter(found["rows"]))
    what = settings.get("control") or settings.get("task") or "quality"
    for column in found["columns"]:
        value = found["rows"][row].get(column["name"])
        if value is not None:
            yield EvalResult(
                task_type="text-to-image",
                task_name=f"Text to image, {what}, {row}",
                dataset_type=str(settings.get("data", "unknown")),
                dataset_name=f"{settings.get('data', 'unknown')}, {settings['count']} prompts",
                dataset_split=settings.get("split"),
                metric_type=column["name"],
                metric_name=f"{what}: {column['title']}",
                metric_value=round(value, column["digits"]),
            )


def _table(source: Path) -> str:
    """What `scaleweaver evaluate` wrote for documents, and where it was measured."""
    found = _evaluation(source)
    machine, settings = found["machine"], found["settings"]
    data = " ".join(str(settings[key]) for key in ("data", "split") if settings.get(key))
    where = machine["gpu"] if machine["gpu"] != "none" else machine["processor"]
    version = machine["versions"]["scaleweaver"]
    return (
        f"{(source / 'results.md').read_text(encoding='utf-8').strip()}\n\n"
        f"{settings['count']} prompts of {data}; {found['main']} is the main number; scaleweaver {version} on {where}."
    )


def _evaluation(source: Path) -> dict[str, Any]:
    if not (source / "results.json").is_file() or not (source / "results.md").is_file():
        raise ValueError(f"measured: {source} lacks results.json or results.md; pass a folder of scaleweaver evaluate")
    return _json(source / "results.json")


def _training(folder: Path, run: Path) -> str:
    """Settings, last validation and last sheets of a run; the sheets are copied beside the card."""
    if not (run / "config.json").is_file():
        raise ValueError(f"run: {run} holds no config.json; pass the folder that scaleweaver train wrote")
    config = _json(run / "config.json")
    settings = [(name, str(config[name])) for name in _SHOWN_SETTINGS if config.get(name) is not None]
    text = f"`scaleweaver train`, recipe `{config['recipe']}`:\n\n{_rows(('setting', 'value'), settings)}"
    last: dict[str, tuple[int, str]] = {}
    if (run / "metrics.csv").is_file():
        with open(run / "metrics.csv", newline="", encoding="utf-8") as lines:
            for entry in csv.DictReader(lines):
                last[entry["name"]] = int(entry["step"]), entry["value"]
    rows = [(name.removeprefix("val_"), value, step) for name, (step, value) in sorted(last.items()) if "val_" in name]
    if rows:
        text += "\n\nLast validation, on pictures that training did not see:\n\n"
        text += _rows(("", "value", "step"), [(name, value, str(step)) for name, value, step in rows])
    sheets = sorted((run / "samples").glob("*.png"))
    newest = sheets[-1].name.partition("-")[0].partition(".")[0] if sheets else ""
    for sheet in (sheet for sheet in sheets if sheet.name.startswith(newest)):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / sheet.name).write_bytes(sheet.read_bytes())
        text += f"\n\n![Held-out samples after step {int(newest)}](images/{sheet.name})"
    return text


def _licence(card: Card) -> str:
    if not card.license and not card.licenses:
        return "Not stated by who uploaded it. The code that runs it is Apache-2.0; weights have licences of their own."
    rows = [("this model", card.license or "not stated"), *card.licenses.items()]
    return _rows(("part", "licence"), rows) + "\n\nThe code that runs it, scaleweaver, is Apache-2.0."


def _limits(parts: Mapping[str, str]) -> str:
    own = "It fits one set of backbone weights. " if "How it works" in parts else ""
    return f"{own}What it cannot draw was not described by who uploaded it. No safety filter is part of the pipeline."


def _kind_of(part: Path) -> str:
    if (part / CONTROL_FILE).is_file():
        return f"control {_json(part / CONTROL_FILE)['config']['kind']}"
    config = _json(part / "config.json") if (part / "config.json").is_file() else {}
    return str(config.get("_class_name") or (config.get("architectures") or ["weights"])[0])


def _weights(part: Path) -> tuple[str, str]:
    """How many numbers the safetensors files hold, in millions, and of which format; nothing is loaded."""
    count, formats = 0, set()
    for path in sorted(part.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                size = 1
                for side in entry.get_shape():
                    size *= side
                count += size
                formats.add(entry.get_dtype())
    return f"{count / 1e6:.2f} M", ", ".join(sorted(formats))


def _plan(schedule: Mapping[str, Any]) -> tuple[str, str]:
    """Default size and scales in words."""
    grids = schedule.get("grids")
    if not grids:
        return f"{schedule.get('budget', 'any number of')} pixels, 15 aspect ratios", "those of Infinity's templates"
    (height, width), stride = grids[-1], schedule["stride"]
    return f"{width * stride}x{height * stride} px", ", ".join(f"{h}x{w}" for h, w in grids)


def _rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
