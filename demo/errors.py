"""What the library refuses, told in the page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import gradio as gr


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same handler, whose refusals (ValueError, OSError) show in the page with their words; bugs stay bugs."""
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _refusals():
                yield from function(*args, **kwargs)

        return stream

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _refusals():
            return function(*args, **kwargs)

    return run


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        # the page shows HTML, and a message may quote what somebody else wrote into a file
        text = " ".join(str(error).split()).replace("<", "&lt;")
        raise gr.Error(text[:1].upper() + text[1:], print_exception=False) from None
