"""`scaleweaver serve`: pictures over HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from scaleweaver.commands import one_line_errors
from scaleweaver.commands.loading import load_pipeline

KEY = "SCALEWEAVER_API_KEY"


@one_line_errors
def serve(
    model: Annotated[str, typer.Option("--model", "-m", help="toybox, a Hub id or a folder.")] = "toybox",
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: as in --model, of a folder its own name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"Ask for this key; better set {KEY}, which no list of processes shows.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together; 1: one after the other.")] = 8,
    batch_wait: Annotated[float, typer.Option(min=0, help="Seconds that a lone picture waits for company.")] = 0.01,
    queue: Annotated[
        int, typer.Option(min=1, help="Pictures accepted and not yet sent; to more the answer is 429.")
    ] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds from request to answer; then it is 504.")] = 120.0,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures of one request.")] = 10,
    max_body: Annotated[int, typer.Option(min=1, help="Megabytes of one request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Millions of pixels of one control image.")] = 16,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact/--no-exact",
            help="Same bits in any batch, as far as measured: in float32 on a CPU; elsewhere one by one.",
        ),
    ] = True,
    rounding: Annotated[
        float | None,
        typer.Option(help="How far a batch moves logits, from benchmarks/serve.py: draws exact batches anywhere."),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None, typer.Option(help="Round the transformer's weights: half the memory.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
    log: Annotated[Literal["text", "json"], typer.Option(help="Form of the log, on stderr.")] = "text",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the networks.")
    ] = "auto",
) -> None:
    """Answer requests in the form of OpenAI's images API, several in one batch."""
    missing = [package for package in ("fastapi", "uvicorn", "prometheus_client") if find_spec(package) is None]
    if missing:
        raise ValueError(f'the server needs {", ".join(missing)}; pip install "scaleweaver[serve]"')
    from scaleweaver.serve.options import MEGABYTE, ServeOptions
    from scaleweaver.serve.server import bind, log_to_stderr
    from scaleweaver.serve.server import serve as answer

    # all that can be wrong without the weights is found before they load
    options = ServeOptions(
        name=name,
        max_batch=max_batch,
        batch_wait=batch_wait,
        queue=queue,
        timeout=timeout,
        max_images=max_images,
        max_body=max_body * MEGABYTE,
        max_pixels=max_pixels * 1_000_000,
        exact=exact,
        rounding=rounding,
        api_key=api_key if api_key is not None else os.environ.get(KEY),
    )
    listener = bind(host, port)
    log_to_stderr(log)
    pipe = load_pipeline(model, device, dtype, quantize=quantize, threads=threads)
    pipe.set_progress_bar_config(disable=True)
    answer(pipe, options, listener)
