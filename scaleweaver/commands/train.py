"""`scaleweaver train`: a recipe from a settings file, a whole model in stages, or a control from one's own photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaleweaver.commands import key_values, one_line_errors

if TYPE_CHECKING:
    from scaleweaver.train.stages import Plan


@one_line_errors
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A settings file, recipes/toybox/canny.yaml; one with stages, recipes/toybox.yaml; or the name of a "
            "recipe with --config."
        ),
    ],
    config: Annotated[Path | None, typer.Option(help="The settings file of that recipe.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of photos with captions, or of webdataset shards.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder of the model, or a Hub id.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; a stopped one goes on.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, also a nested one: a.b=3; repeatable."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop in time; the same command goes on.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of a recipe with stages: cpu or gpu.")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a recipe with stages: this one alone.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Of a recipe with stages: what is done, and stop.")] = False,
    pack: Annotated[
        Path | None, typer.Option(help="Of a recipe with stages: write the run into this folder to move it, and stop.")
    ] = None,
    unpack: Annotated[Path | None, typer.Option(help="Put back what --pack wrote, and stop.")] = None,
    mebibytes: Annotated[int, typer.Option(min=1, help="Size of all that --pack writes, in pieces of 16.")] = 128,
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
    from scaleweaver.train import is_plan, read_config, run

    if is_plan(chosen):
        _refuse(f"{chosen} has several stages", {"--data": data, "--model": model, "--estimate": estimate or None})
        from scaleweaver.train.stages import read_plan

        stages = read_plan(chosen, preset, out=out, overrides=settings)
        if stage is not None:
            stages.find(stage)  # complains of a name that is none
        if plan:
            _print_plan(stages)
        elif pack is not None or unpack is not None:
            _move(stages, pack, unpack, mebibytes)
        else:
            _run_stages(stages, minutes, stage)
        return
    of_stages = {"--preset": preset, "--stage": stage, "--plan": plan or None, "--pack": pack, "--unpack": unpack}
    _refuse(f"{chosen} has no stages", of_stages)
    if minutes is not None:
        settings["minutes"] = minutes
    if data is not None:
        settings["data"] = {"photos": str(data)}
    settings |= {key: str(value) for key, value in {"model": model, "out": out}.items() if value is not None}
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


def _refuse(reason: str, options: Mapping[str, Any]) -> None:
    """An error that names the options that were given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{reason}, so there is no {', '.join(given)}; leave it out")


def _run_stages(plan: Plan, minutes: float | None, stage: str | None) -> None:
    from scaleweaver.train.stages import run_stages

    if run_stages(plan, minutes=minutes, only=stage, say=typer.echo):
        typer.echo(str(plan.stages[-1].out / "result"))


def _move(plan: Plan, pack: Path | None, unpack: Path | None, mebibytes: int) -> None:
    """Writes a run as pieces, or puts one back."""
    from scaleweaver.train import pieces

    if pack is not None and unpack is not None:
        raise ValueError("--pack and --unpack were both given; pass one of them")
    if pack is not None:
        said = pieces.pack(plan, pack, limit=mebibytes * 2**20)
    else:
        assert unpack is not None
        said = pieces.unpack(plan, unpack)
    for line in said:
        typer.echo(line)


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "recipe", "steps", "", "takes", box=None)
    table.columns[2].justify = "right"
    for stage in plan.stages:
        recipe, steps = (stage.config.recipe, stage.config.steps) if stage.config else ("", "")
        begun = f"{stage.steps_done} done" if stage.steps_done else "waits"
        state = "finished" if stage.finished else begun
        table.add_row(stage.name, recipe, str(steps), state, ", ".join(stage.needs))
    Console(markup=False, highlight=False).print(table)
    typer.echo(f"preset {plan.preset or 'none'}, in {plan.out}")


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
