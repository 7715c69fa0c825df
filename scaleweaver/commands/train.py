"""`scaleweaver train`: a recipe from a settings file, or a control from one's own photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaleweaver.commands import key_values, one_line_errors


@one_line_errors
def train(
    recipe: Annotated[
        str, typer.Argument(help="A settings file, recipes/toybox/canny.yaml, or the name of a recipe with --config.")
    ],
    config: Annotated[Path | None, typer.Option(help="The settings file of that recipe.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of photos with captions, or of webdataset shards.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder of the model, or a Hub id.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; a stopped one goes on.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, also a nested one: a.b=3; repeatable."),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print what memory a GPU needs, and stop.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the batch, for --estimate.")] = 1,
) -> None:
    """Train what a recipe describes, or go on where its run was stopped."""
    file = Path(recipe)
    named = file.suffix not in (".yaml", ".yml")
    if named and config is None:
        raise ValueError(f"the recipe {recipe} needs its settings; pass --config FILE, or the file alone")
    if not named and config is not None:
        raise ValueError(f"{recipe} and --config {config} are both settings files; pass one of them")
    chosen = config if named and config is not None else file
    settings = read_settings(overrides or [])
    if data is not None:
        settings["data"] = {"photos": str(data)}
    settings |= {key: str(value) for key, value in {"model": model, "out": out}.items() if value is not None}
    from scaleweaver.train import read_config, run

    if named and (held := read_config(chosen, settings).recipe) != recipe:
        raise ValueError(f"{chosen} holds settings of the recipe {held}, not of {recipe}; pass another file")
    if estimate:
        _print_estimate(read_config(chosen, settings), processes)
    else:
        typer.echo(str(run(chosen, settings)))


def read_settings(entries: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` entries; a value is read as in a yaml file."""
    import yaml

    return key_values(entries, yaml.safe_load, "steps=200")


def _print_estimate(config: Any, processes: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from scaleweaver.train.memory import estimate

    plan = estimate(config, processes=processes)
    table = Table("memory of a GPU", "GiB", box=None)
    table.columns[1].justify = "right"
    for name, size in plan.rows():
        table.add_row(name, f"{size / 2**30:.2f}", style="bold" if name.startswith("peak of training") else None)
    Console(markup=False, highlight=False).print(table)
    each = f", {processes} processes" if processes > 1 else ""
    typer.echo(f"batch {config.batch}{each}, up to {plan.tokens} tokens a picture")
