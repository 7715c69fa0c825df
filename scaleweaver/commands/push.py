"""`scaleweaver push`: a saved pipeline or control to the Hub, with a card of what is known about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaleweaver.commands import one_line_errors


@one_line_errors
def push(
    folder: Annotated[Path, typer.Argument(help="A pipeline or a control, such as RUN/result/canny.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    summary: Annotated[str, typer.Option(help="A sentence on what it is.")] = "",
    license: Annotated[str | None, typer.Option(help="The Hub's name of it: apache-2.0, mit, other, ...")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that it belongs to.")] = None,
    picture: Annotated[
        list[Path] | None, typer.Option(help="A picture drawn with it; its prompt is read out of it. Repeatable.")
    ] = None,
    measured: Annotated[list[Path] | None, typer.Option(help="A folder of scaleweaver evaluate; repeatable.")] = None,
    run: Annotated[Path | None, typer.Option(help="The training run; default: the one the folder lies in.")] = None,
    limits: Annotated[str, typer.Option(help="What it cannot do.")] = "",
    keep_card: Annotated[
        bool, typer.Option("--keep-card", help="Send README.md of the folder, not a new one.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.")] = "Upload scaleweaver model",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="As a pull request.")] = False,
) -> None:
    """Put a saved pipeline or control on the Hugging Face Hub, with a model card of what is known about it."""
    from scaleweaver.cards import Card
    from scaleweaver.hub import push_folder

    card = Card(
        summary=summary,
        license=license,
        base_model=base_model,
        pictures=picture or (),
        measured=measured or (),
        run=run,
        limits=limits,
    )
    address = push_folder(
        folder,
        repo,
        card=None if keep_card else card,
        private=private or None,
        commit_message=message,
        create_pr=create_pr,
    )
    typer.echo(address)
