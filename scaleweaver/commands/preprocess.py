"""`scaleweaver preprocess`: a control map from a photo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaleweaver.commands import key_values, one_line_errors


@one_line_errors
def preprocess(
    kind: Annotated[
        str,
        typer.Argument(
            help="Kind of map: canny, depth, pose, softedge, lineart, scribble, lines, normals, segmentation, palette,"
            " blur, tile, grey or inpaint."
        ),
    ],
    image: Annotated[Path, typer.Argument(help="The photo.")],
    out: Annotated[Path, typer.Argument(help="Where the map goes.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the kind, for example model=toybox; repeatable."),
    ] = None,
    low: Annotated[float | None, typer.Option(min=0, help="Lower threshold of canny; default: 100.")] = None,
    high: Annotated[float | None, typer.Option(min=0, help="Upper threshold of canny; default: 200.")] = None,
    detect_resolution: Annotated[
        int | None, typer.Option(min=1, help="Short side at which the detection runs; default: the photo's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps; for kinds with a network.")] = None,
    sixteen_bit: Annotated[bool, typer.Option("--sixteen-bit", help="Depth alone: write a 16-bit PNG.")] = False,
    keypoints: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="Pose alone: also write OpenPose's JSON.")
    ] = None,
) -> None:
    """Make a control map from a photo."""
    from PIL import Image

    from scaleweaver.controls import Depth, Pose, preprocessor

    Image.init()
    if Image.EXTENSION.get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{out.name!r} does not end like a picture; write for example {out.stem}.png")
    if sixteen_bit and (kind != "depth" or out.suffix.lower() != ".png"):
        raise ValueError(f"--sixteen-bit writes depth as PNG, this is {kind} as {out.suffix}; leave it out")
    if keypoints and kind != "pose":
        raise ValueError(f"--json writes the key points of pose, this is {kind}; leave it out")
    named = {"low": low, "high": high, "detect_resolution": detect_resolution, "device": device}
    settings = read_changes(changes or []) | {name: value for name, value in named.items() if value is not None}
    detect = preprocessor(kind, **settings)
    if keypoints and isinstance(detect, Pose):
        record = detect.to_json(image)
        keypoints.parent.mkdir(parents=True, exist_ok=True)
        keypoints.write_text(json.dumps(record), encoding="utf-8")
        typer.echo(str(keypoints))
        made = detect.draw(record)
    else:
        made = detect.sixteen_bit(image) if sixteen_bit and isinstance(detect, Depth) else detect(image)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    typer.echo(str(out))


def read_changes(entries: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` entries; a value is JSON where it can be read as such, else text."""
    return key_values(entries, _json_or_text, "low=50")


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
