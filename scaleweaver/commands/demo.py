"""`scaleweaver demo`: the page in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from scaleweaver.commands import one_line_errors
from scaleweaver.commands.loading import load_pipeline


@one_line_errors
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="toybox, a Hub id or a folder.")] = "toybox",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: for other machines too.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Open a page to draw with: controls from photos, sketches and skeletons, pictures after every scale."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError('the demo needs gradio; pip install "scaleweaver[demo]"') from None
    from scaleweaver.demo.page import launch
    from scaleweaver.demo.studio import Studio

    studio = Studio(load_pipeline(model, device, dtype))
    launch(studio, server_name=host, server_port=port, inbrowser=open_browser)
