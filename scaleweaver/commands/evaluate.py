"""`scaleweaver evaluate`: how well a model follows its controls, and how good its pictures are."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleweaver.commands import one_line_errors
from scaleweaver.commands.loading import load_pipeline
from scaleweaver.commands.preprocess import read_changes

if TYPE_CHECKING:
    from scaleweaver.controls.estimator import ToyboxEstimator
    from scaleweaver.evaluate.attributes import AttributeJudge
    from scaleweaver.evaluate.examples import Examples, FolderExamples, ToyboxExamples
    from scaleweaver.evaluate.protocols import EvaluationProtocol

evaluate = typer.Typer(
    help="Measure a model: how closely it follows a control, and what its pictures show.", no_args_is_help=True
)

Model = Annotated[str, typer.Option("--model", "-m", help="toybox, a Hub id or a folder.")]
Data = Annotated[str, typer.Option(help="toybox, or a folder of pictures with captions.")]
Split = Annotated[str, typer.Option(help="Of toybox: test, val or heldout, which no training saw.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, help="Number of prompts; default: 200.")]
Size = Annotated[int | None, typer.Option(min=16, help="Side of the pictures in pixels; default: the model's.")]
Seed = Annotated[int, typer.Option(help="Of the first picture; each has one of its own.")]
Images = Annotated[int | None, typer.Option(min=1, help="Pictures per prompt; default: 1.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at once; changes no picture.")]
Guidance = Annotated[float | None, typer.Option(help="How closely to follow the prompt; default: the model's.")]
ControlGuidance = Annotated[float | None, typer.Option(help="How closely to follow the control; default: the model's.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the preprocessor, as in preprocess; repeatable."),
]
Shown = Annotated[int, typer.Option(min=0, help="Pictures in each grid of the report.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Format = Annotated[str, typer.Option(help="Number format of the networks: auto, float32, bfloat16 or float16.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the report; an interrupted run goes on there.")]


@evaluate.command()
@one_line_errors
def control(
    kind: Annotated[str, typer.Option("--kind", "-k", help="Kind of map: canny, depth, pose, palette, ...")],
    out: Out,
    model: Model = "toybox",
    name: Annotated[str | None, typer.Option(help="The control's name in the model; default: its kind.")] = None,
    load_control: Annotated[str | None, typer.Option(help="Folder or Hub id of a control to load first.")] = None,
    data: Data = "toybox",
    split: Split = "test",
    count: Count = None,
    scales: Annotated[str, typer.Option(help="Strengths, with commas.")] = "1.0,0.5",
    baseline: Annotated[
        str, typer.Option(help='no-control, mismatched, reconstruction, with commas; "" for none.')
    ] = "no-control,mismatched,reconstruction",
    protocol: Annotated[str | None, typer.Option(help="Settings of a paper: controlnet++ or controlar.")] = None,
    size: Size = None,
    seed: Seed = 0,
    images_per_prompt: Images = None,
    batch: Batch = 16,
    guidance_scale: Guidance = None,
    control_guidance_scale: ControlGuidance = None,
    changes: Changes = None,
    estimator: Annotated[
        Path | None, typer.Option(help="Folder of what finds depth and poses in toybox; default: the built-in one.")
    ] = None,
    shown: Shown = 12,
    device: Device = "auto",
    dtype: Format = "auto",
) -> None:
    """Control fidelity: the map found in the pictures against the map that was given, with floors and ceilings."""
    strengths = _numbers(scales)
    baselines = [part.strip() for part in baseline.split(",") if part.strip()]
    from scaleweaver.evaluate.examples import EXACT, meter_of
    from scaleweaver.evaluate.fidelity import evaluate_control, rows_of
    from scaleweaver.evaluate.report import write
    from scaleweaver.toybox.progress import rendering_progress

    rows_of(strengths, baselines)  # complains before anything is loaded
    preset = _preset(protocol)
    if preset and data == "toybox":
        raise ValueError(f"--protocol {protocol} is for photos; pass their folder as --data")
    settings = dict(preset.detectors.get(kind, {}) if preset else {}) | read_changes(changes or [])
    pipe = load_pipeline(model, device, dtype)
    if load_control is not None:
        name = pipe.load_control(load_control, name)
    call = _call(pipe, preset, size, guidance_scale, control_guidance_scale)
    examples = _examples(data, split, [kind], {kind: settings}, call["height"], call["width"])
    meter = meter_of(kind, examples, _estimator(estimator, pipe.device) if data == "toybox" and kind in EXACT else None)
    wanted = count or _count(preset, examples)
    with rendering_progress(f"evaluating {kind}") as on_progress:
        outcome = evaluate_control(
            pipe, examples, meter, out, name=name or kind, count=wanted, strengths=strengths, baselines=baselines,
            seed=seed, images_per_prompt=images_per_prompt or (preset.images_per_prompt if preset else 1),
            batch=batch, call=call, shown=shown, on_progress=on_progress,
        )  # fmt: skip
    notes = [f"Protocol {preset.name}: {preset.note}"] if preset else []
    _show(write(out, outcome, title=f"Control fidelity: {kind}", notes=notes, command=_command()), out)


@evaluate.command()
@one_line_errors
def quality(
    out: Out,
    model: Model = "toybox",
    controls: Annotated[str, typer.Option("--kind", "-k", help="Also draw under these controls, with commas.")] = "",
    data: Data = "toybox",
    split: Split = "test",
    count: Count = None,
    judge: Annotated[Path | None, typer.Option(help="Folder of an AttributeJudge; default: the built-in one.")] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Of the Frechet distance: judge, efficientnet-lite0; default: the judge's on toybox."),
    ] = None,
    fid: Annotated[bool, typer.Option("--fid", help="Also FID, on Inception's weights, which are downloaded.")] = False,
    clip: Annotated[
        str | None, typer.Option(help="Also CLIP score, by this model: openai/clip-vit-base-patch16 or a folder.")
    ] = None,
    size: Size = None,
    seed: Seed = 0,
    images_per_prompt: Images = None,
    batch: Batch = 16,
    guidance_scale: Guidance = None,
    control_guidance_scale: ControlGuidance = None,
    shown: Shown = 12,
    device: Device = "auto",
    dtype: Format = "auto",
) -> None:
    """Pictures as pictures: what a judge finds of what was asked for, and the distance to true ones by its features."""
    from scaleweaver.evaluate.frechet import feature_extractor
    from scaleweaver.evaluate.quality import Metrics, evaluate_quality
    from scaleweaver.evaluate.report import write
    from scaleweaver.toybox.progress import rendering_progress

    kinds = [part.strip() for part in controls.split(",") if part.strip()]
    # the judge knows the built-in world alone
    named = (features or ("judge" if data == "toybox" else "efficientnet-lite0")).split(",")
    judging = _judge(judge) if data == "toybox" or judge is not None or "judge" in named else None
    pipe = load_pipeline(model, device, dtype)
    call = _call(pipe, None, size, guidance_scale, control_guidance_scale)
    examples = _examples(data, split, kinds, {}, call["height"], call["width"])
    if judging is not None:
        judging.to(pipe.device)
    extractors = [feature_extractor(name.strip(), judging, str(pipe.device)) for name in named]
    metrics = Metrics(judging, extractors, fid, clip, str(pipe.device))
    with rendering_progress("evaluating") as on_progress:
        outcome = evaluate_quality(
            pipe, examples, out, metrics, controls=kinds, count=count or _count(None, examples), seed=seed,
            images_per_prompt=images_per_prompt or 1, batch=batch, call=call, shown=shown, on_progress=on_progress,
        )  # fmt: skip
    _show(write(out, outcome, title="Picture quality", command=_command()), out)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--scales {text!r} are not numbers with commas; write for example 1.0,0.5") from None


def _preset(name: str | None) -> EvaluationProtocol | None:
    if name is None:
        return None
    from scaleweaver.evaluate.protocols import protocol

    return protocol(name)


def _count(preset: EvaluationProtocol | None, examples: Examples) -> int:
    """The protocol's number of prompts, 200 without one, and never more than there are."""
    wanted = preset.count if preset else 200
    return wanted if examples.limit is None else min(wanted, examples.limit)


def _call(
    pipe: Any,
    preset: EvaluationProtocol | None,
    size: int | None,
    guidance_scale: float | None,
    control_guidance_scale: float | None,
) -> dict[str, Any]:
    """Keywords of every call of the pipeline, with the size that it really draws."""
    from scaleweaver.request import read_schedule

    side = size or (preset.size if preset else None)
    plan = read_schedule(None, pipe.config["schedule"], side, side)
    given = {"guidance_scale": guidance_scale, "control_guidance_scale": control_guidance_scale}
    call: dict[str, Any] = {"height": plan.height, "width": plan.width, **(preset.call if preset else {})}
    return call | {name: value for name, value in given.items() if value is not None}


def _examples(
    data: str, split: str, kinds: Sequence[str], detectors: Mapping[str, Mapping[str, Any]], height: int, width: int
) -> FolderExamples | ToyboxExamples:
    from scaleweaver.evaluate.examples import FolderExamples, ToyboxExamples

    if data != "toybox":
        return FolderExamples(data, kinds, height=height, width=width, detectors=detectors)
    if height != width:
        raise ValueError(f"the built-in world is rendered as squares and the model draws {width}x{height}; pass --size")
    return ToyboxExamples(split, kinds, size=height, detectors=detectors)


def _estimator(folder: Path | None, device: Any) -> ToyboxEstimator:
    from scaleweaver.controls.estimator import ToyboxEstimator

    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no estimator; pass the folder that the recipe estimator wrote")
    network: Any = ToyboxEstimator.from_pretrained(folder) if folder else ToyboxEstimator.built_in()
    estimator: ToyboxEstimator = network.float().eval().to(device)
    return estimator


def _judge(folder: Path | None) -> AttributeJudge:
    from scaleweaver.evaluate.attributes import AttributeJudge

    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no judge; pass the folder that the recipe judge wrote")
    network: Any = AttributeJudge.from_pretrained(folder) if folder else AttributeJudge.built_in()
    judge: AttributeJudge = network.float().eval()
    return judge


def _command() -> str:
    return shlex.join(["scaleweaver", *sys.argv[1:]])


def _show(paths: Sequence[Path], out: Path) -> None:
    typer.echo((out / "results.md").read_text(encoding="utf-8"))
    for path in paths:
        typer.echo(str(path))
