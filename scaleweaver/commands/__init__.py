"""Commands of `scaleweaver` that have a file of their own, and how they fail: in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import typer

P = ParamSpec("P")


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """What the library refuses becomes one red line and exit code 1; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:
            from rich.console import Console

            line = " ".join(str(error).split()) or type(error).__name__
            Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from None

    return run


def key_values(entries: Sequence[str], read: Callable[[str], Any], example: str) -> dict[str, Any]:
    """The `KEY=VALUE` entries of an option --set, each value as `read` gives it."""
    settings: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {entry!r} is not KEY=VALUE; write for example --set {example}")
        settings[key] = read(value)
    return settings
