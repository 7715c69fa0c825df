"""The `scaleweaver` command: the Python API under the same parameter names.

Commands import what they need when they run, so that `scaleweaver --help` does not wait for torch.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaleweaver.commands import one_line_errors
from scaleweaver.commands.bench import bench
from scaleweaver.commands.demo import demo
from scaleweaver.commands.evaluate import evaluate
from scaleweaver.commands.loading import load_pipeline, no_collection
from scaleweaver.commands.preprocess import preprocess
from scaleweaver.commands.push import push
from scaleweaver.commands.serve import serve
from scaleweaver.commands.train import train

if TYPE_CHECKING:
    from PIL import Image

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

app = typer.Typer(
    name="scaleweaver",
    help="Draw pictures scale by scale, under control.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert = typer.Typer(help="Turn a foreign checkpoint into a folder that from_pretrained reads.", no_args_is_help=True)
app.add_typer(convert, name="convert")
app.add_typer(evaluate, name="evaluate")


def _show_version(wanted: bool) -> None:
    if wanted:
        from scaleweaver import __version__

        typer.echo(f"scaleweaver {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
@one_line_errors
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.")],
    model: Annotated[str, typer.Option("--model", "-m", help="toybox, a Hub id or a folder.")] = "toybox",
    control: Annotated[
        list[str] | None, typer.Option("--control", "-c", metavar="KIND=PATH", help="A control image; repeatable.")
    ] = None,
    control_scale: Annotated[
        list[float] | None, typer.Option(help="Strength: once for all controls, or once for each.")
    ] = None,
    control_start: Annotated[
        list[float] | None, typer.Option(help="Where it sets in, as a fraction of the scales; repeatable like that.")
    ] = None,
    control_end: Annotated[list[float] | None, typer.Option(help="Where it ends; 0.5: half-way.")] = None,
    control_scales: Annotated[
        list[str] | None, typer.Option(metavar="A:B", help="Scales where it acts, as in Python: 2:5, 2:, or 0,3.")
    ] = None,
    photos: Annotated[
        bool, typer.Option("--preprocess", help="The control images are photos: make the maps from them.")
    ] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i is drawn with seed + i; default: a new one.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images per prompt.")] = 1,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels; default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    control_guidance_scale: Annotated[
        float | None, typer.Option(help="How closely to follow the control; 1: off, default: the model's.")
    ] = None,
    guidance_layer: Annotated[
        int | None, typer.Option(help="Guide the state after this layer, not the logits; -5: the fifth from the end.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 1 is bolder, below 1 safer.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k likeliest values of a code; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep the likeliest values up to p; 0: all.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture file, or a folder.")] = Path("out"),
    previews: Annotated[bool, typer.Option("--previews", help="Also write the picture after every scale.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Number format of the networks.")] = "auto",
    quantize: Annotated[
        Literal["int8"] | None, typer.Option(help="Round the transformer's weights: half the memory.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
) -> None:
    """Draw pictures from prompts, with or without control images."""
    with no_collection():
        from scaleweaver.commands.control_options import read_controls

    controls = read_controls(
        control or [], control_scale or [], control_start or [], control_end or [], control_scales or []
    )
    started = time.perf_counter()
    pipe = load_pipeline(model, device, dtype, quantize=quantize, threads=threads)
    loaded = time.perf_counter()

    strips: list[list[Image.Image]] = []

    def keep_previews(pipe: Any, index: int, step: Any, values: dict[str, Any]) -> None:
        strips.append(values["preview"]())

    chosen = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        "control_guidance_scale": control_guidance_scale,
        "guidance_layer": guidance_layer,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    if photos:
        from scaleweaver.control_maps import map_of_photo

        side = min(height, width) if height and width else None
        controls = [
            # of a control that is not loaded the pipeline's own message names what there is
            replace(one, image=map_of_photo(one.image, pipe.controls[one.kind].config, side))
            if one.kind in pipe.controls
            else one
            for one in controls
        ]
    result = pipe(
        prompts if len(prompts) > 1 else prompts[0],
        control=controls or None,
        num_images_per_prompt=num_images,
        seed=seed,
        callback_on_step_end=keep_previews if previews else None,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    drawn = time.perf_counter()

    each = [prompt for prompt in prompts for _ in range(num_images)]
    paths = _output_files(out, each, result.seeds)
    for row, (file, image) in enumerate(zip(paths, result.images, strict=True)):
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        typer.echo(str(file))
        if previews:
            strip = file.with_name(f"{file.stem}-scales.png")
            _strip([images[row] for images in strips]).save(strip)
            typer.echo(str(strip))
    pictures = "picture" if len(paths) == 1 else "pictures"
    typer.echo(f"{len(paths)} {pictures} in {drawn - loaded:.1f} s, after {loaded - started:.1f} s of loading")


def _output_files(out: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """One path per image: `out` itself, numbered when there are several, or prompt and seed in the folder `out`."""
    if out.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        if len(seeds) == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{row}{out.suffix}") for row in range(len(seeds))]
    names = [re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-") or "picture" for prompt in prompts]
    return [out / f"{name}-{seed}.png" for name, seed in zip(names, seeds, strict=True)]


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, coarse to fine."""
    from PIL import Image

    width, height = images[-1].size
    strip = Image.new("RGB", (width * len(images), height))
    for column, image in enumerate(images):
        strip.paste(image.resize((width, height), Image.Resampling.BICUBIC), (column * width, 0))
    return strip


app.command()(preprocess)
app.command()(demo)
app.command()(serve)


@app.command()
@one_line_errors
def inspect(
    image: Annotated[Path, typer.Argument(help="A picture that scaleweaver has drawn.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the prompt, seed and settings that a picture carries, and the Python that draws it again."""
    from scaleweaver.metadata import python_of, read_settings

    settings = read_settings(image)
    if as_json:
        typer.echo(json.dumps(settings, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in settings.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    console = Console(markup=False, highlight=False)
    console.print(table)
    typer.echo("\n" + python_of(settings))


@app.command()
@one_line_errors
def render(
    world: Annotated[str, typer.Argument(help="The world to render: toybox.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")],
    split: Annotated[str, typer.Option(help="train, val, test or heldout.")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of pictures.")] = 1000,
    start: Annotated[
        int, typer.Option("--seed", "--start", min=0, help="Index of the first one: a picture is a function of it.")
    ] = 0,
    size: Annotated[int, typer.Option(min=16, help="Width and height in pixels.")] = 128,
    shards: Annotated[bool, typer.Option("--shards", help="Write tar files in place of single ones.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that render beside this one.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; other than cpu it needs 0 workers.")] = "cpu",
    version: Annotated[int, typer.Option("--world", help="Version of the world: 1, which the weights know, or 2.")] = 1,
) -> None:
    """Render the built-in world: pictures with captions and exact control maps. Goes on where it was stopped."""
    if world != "toybox":
        raise ValueError(f"there is no world {world!r}; the built-in one is called toybox")
    from scaleweaver.toybox.folder import write_folder
    from scaleweaver.toybox.progress import rendering_progress

    started = time.perf_counter()
    with rendering_progress("rendering") as on_progress:
        rendered = write_folder(
            out, split, count, start=start, size=size, shards=shards, workers=workers, device=device,
            version=version, on_progress=on_progress,
        )  # fmt: skip
    typer.echo(f"{out}: {count} pictures, {rendered} rendered now, in {time.perf_counter() - started:.1f} s")


app.command()(train)
app.command()(bench)
app.command()(push)


@convert.command("infinity")
@one_line_errors
def convert_infinity(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    transformer: Annotated[Path, typer.Option(help="Transformer checkpoint, for example infinity_2b_reg.pth.")],
    vae: Annotated[Path, typer.Option(help="Tokenizer checkpoint, for example infinity_vae_d32reg.pth.")],
    text_encoder: Annotated[str, typer.Option(help="Hub id or folder of the T5 encoder.")] = "google/flan-t5-xl",
    budget: Annotated[str | None, typer.Option(help="Default picture size: 0.06M, 0.25M, 0.60M or 1M pixels.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to save in; default: that of the files.")] = None,
) -> None:
    """Infinity (125M, 2B, 8B) and its bitwise tokenizers."""
    from scaleweaver.convert.infinity import convert_infinity as convert_checkpoint

    folder = convert_checkpoint(
        transformer=transformer, vae=vae, text_encoder=text_encoder, out=out, dtype=dtype, budget=budget
    )
    typer.echo(str(folder))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this installation can do, what is missing, and the command that gets it."""
    from dataclasses import asdict

    from scaleweaver.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("problem", "red")}
        table = Table("", "", "found", "to do", box=None)
        for finding in findings:
            mark, color = marks[finding.status]
            table.add_row(mark, finding.name, finding.found, finding.fix, style=color)
        Console(markup=False, highlight=False).print(table)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as end:
        if (end.code is None or isinstance(end.code, int)) and _is_over():
            os._exit(end.code or 0)
        raise


def _is_over() -> bool:
    """Whether the program may stop here and now: Python takes a million objects apart before it stops by itself, which
    lasts longer than to draw some pictures. What was to be done at exit is done then, and all output is written.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if not all(thread.daemon for thread in others):
        return False
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever reads the output is gone, about which Python has its own words
        return False
    return True
