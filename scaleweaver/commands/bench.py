"""`scaleweaver bench`: how fast this machine draws with a model, stage by stage, and against a plain implementation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaleweaver.commands import one_line_errors
from scaleweaver.commands.loading import load_pipeline

if TYPE_CHECKING:
    from rich.table import Table

    from scaleweaver.pipeline import VARControlPipeline

PROMPT = "a large red rocket on grass at noon"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Size = tuple[int | None, int | None]


@one_line_errors
def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="toybox, a Hub id or a folder.")] = "toybox",
    prompt: Annotated[str, typer.Option(help="What to draw.")] = PROMPT,
    control: Annotated[
        str | None, typer.Option("--control", "-c", metavar="KIND", help="Default: the model's first; none: without.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; default: the model's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pictures of each kind, after a first one.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further round after so many.")] = 40.0,
    plain: Annotated[bool, typer.Option("--plain/--no-plain", help="Compare with a plain implementation too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format of the networks.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how long a picture takes here, and how much memory."""
    started = time.perf_counter()
    pipe = load_pipeline(model, device, dtype, threads=threads)
    loaded = time.perf_counter() - started
    pipe.set_progress_bar_config(disable=True)
    report = {
        "model": model,
        "prompt": prompt,
        **_pictures(pipe, prompt, _chosen(pipe, control), (height, width), repeats, seconds * (0.6 if plain else 1)),
    }
    report["load_seconds"] = round(loaded, 3)
    if plain:
        report["plain"] = _against_plain(pipe, model, prompt, (height, width), repeats, seconds * 0.4)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for line in _lines(report):
        console.print(line)
    console.print(_stages(report))


def _chosen(pipe: VARControlPipeline, control: str | None) -> str | None:
    """The kind of control to draw under, if any."""
    kinds = pipe.available_controls
    if control == "none" or (control is None and not kinds):
        return None
    if control is not None and control not in kinds:
        raise ValueError(f"the model has no control {control!r}; pass one of {', '.join(kinds) or 'none'}, or none")
    return control or kinds[0]


def _pictures(
    pipe: VARControlPipeline, prompt: str, kind: str | None, size: Size, repeats: int, seconds: float
) -> dict[str, Any]:
    """Times per stage without and under a control, the first picture apart, and memory beside its estimate."""
    import torch

    from scaleweaver.evaluate.memory import nbytes, peak_bytes
    from scaleweaver.evaluate.speed import draw, machine, measure, peak_rss

    call: dict[str, Any] = {"height": size[0], "width": size[1]}
    encoded_size = pipe.estimate(prompt, **call).schedule
    controls: dict[str, Any] = {"without control": None}
    if kind is not None:
        controls[f"under {kind}"] = {kind: _checkerboard(encoded_size.height, encoded_size.width)}
    pipe_device = torch.device(pipe.device)
    if pipe_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe_device)
    ways = {
        name: lambda watch, given=given: draw(pipe, prompt, watch, control=given, seed=0, **call)
        for name, given in controls.items()
    }
    times = measure(ways, pipe_device, repeats=repeats, seconds=seconds)

    given = list(controls.values())[-1]
    if pipe_device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(pipe_device)
    else:
        parts = [
            part for part in (*pipe.components.values(), *pipe.controls.values()) if isinstance(part, torch.nn.Module)
        ]
        measured = nbytes(torch.nn.ModuleList(parts)) + peak_bytes(lambda: pipe(prompt, control=given, seed=0, **call))
    return {
        "machine": machine(pipe_device, pipe.transformer.dtype),
        "picture": [encoded_size.width, encoded_size.height],
        "first_picture_seconds": round(next(iter(times.values())).warmup[0]["total"], 3),
        "pictures": {name: one.to_dict() for name, one in times.items()},
        "peak_bytes": measured,
        "estimated_peak_bytes": pipe.estimate(prompt, control=given, **call).peak_bytes,
        "peak_rss_bytes": peak_rss(),
    }


def _checkerboard(height: int, width: int) -> Any:
    """A control image; what it shows changes no cost."""
    import numpy as np
    from PIL import Image

    rows, columns = np.indices((height, width)) // 16
    return Image.fromarray(((rows + columns) % 2 * 255).astype(np.uint8))


def _against_plain(
    pipe: VARControlPipeline, model: str, prompt: str, size: Size, repeats: int, seconds: float
) -> dict[str, Any]:
    """Scales and decoding of a picture without control, in turn with the plain implementation.

    That computes as the original does: on a GPU under bfloat16 autocast, elsewhere in float32 with weights of its own.
    """
    import torch

    from scaleweaver.evaluate.plain import PlainInfinity
    from scaleweaver.evaluate.speed import Stopwatch, draw, measure, ratio
    from scaleweaver.pipeline import VARControlPipeline

    cuda = pipe.device.type == "cuda"
    other = pipe
    if not cuda and pipe.transformer.dtype != torch.float32:
        other = VARControlPipeline.from_pretrained(model, dtype=torch.float32, text_encoder=None, tokenizer=None)
        other.to(pipe.device)
    baseline = PlainInfinity(other.transformer, other.vae, autocast=torch.bfloat16 if cuda else None)
    text = pipe.encode_prompt(prompt)
    schedule = pipe.estimate(prompt, height=size[0], width=size[1]).schedule
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    numbers: Mapping[str, Any] = {name: pipe.config[name] for name in names}

    def plainly(watch: Stopwatch) -> None:
        generators = [torch.Generator().manual_seed(0)]
        latent = baseline.generate(text, schedule, generators=generators, **numbers)
        watch.lap("generation")
        baseline.decode(latent)
        watch.lap("decoding")

    def ours(watch: Stopwatch) -> None:
        latent = draw(pipe, None, Stopwatch(), decode=False, prompt_embeds=text, schedule=schedule, seed=0)
        watch.lap("generation")
        pipe.preview(latent)
        watch.lap("decoding")

    times = measure({"plain": plainly, "ours": ours}, pipe.device, repeats=repeats, seconds=seconds)
    return {
        "dtype": "bfloat16 autocast" if cuda else "float32",
        **{name: one.to_dict() for name, one in times.items()},
        "times_faster": {
            stage: round(ratio(times["plain"], times["ours"], stage), 2)
            for stage in ("generation", "decoding", "total")
        },
    }


def _lines(report: dict[str, Any]) -> list[str]:
    where = report["machine"]
    lines = [
        f"{report['model']}, {report['picture'][0]}x{report['picture'][1]}, {where['dtype']} on "
        f"{where.get('gpu', where['processor'])}, threads: {where['threads']}, torch {where['versions']['torch']}",
        f"loaded in {report['load_seconds']:.2f} s with all imports, "
        f"first picture after {report['first_picture_seconds']:.2f} s",
        *(
            f"a picture {name}: {one['stages']['total']['median']:.3f} s, median of {one['repeats']}"
            for name, one in report["pictures"].items()
        ),
        f"memory of tensors at the most: {report['peak_bytes'] / 2**20:.0f} MiB measured, "
        f"{report['estimated_peak_bytes'] / 2**20:.0f} MiB estimated by pipe.estimate()",
    ]
    if report["peak_rss_bytes"] is not None:
        lines.append(f"memory of this process at the most: {report['peak_rss_bytes'] / 2**20:.0f} MiB")
    if "plain" in report:
        faster = report["plain"]["times_faster"]
        lines.append(
            f"a plain eager implementation ({report['plain']['dtype']}) takes {faster['total']:.1f} times as long: "
            f"scales {faster['generation']:.1f}, decoding {faster['decoding']:.1f}"
        )
    return lines


def _stages(report: dict[str, Any]) -> Table:
    from rich.table import Table

    pictures = report["pictures"]
    table = Table("stage, median seconds", *pictures, box=None)
    longest = max(pictures.values(), key=lambda one: len(one["stages"]))
    for stage in longest["stages"]:
        cells = [one["stages"].get(stage) for one in pictures.values()]
        table.add_row(stage, *("" if cell is None else f"{cell['median']:.4f}" for cell in cells))
    return table
