"""A bar for rendering that takes long, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def rendering_progress(label: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """An `on_progress` for the block, drawn on standard error once it is called, where that is a terminal."""
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = bar.add_task(label, total=None)

    def show(done: int, count: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=count)

    try:
        yield show
    finally:
        bar.stop()
