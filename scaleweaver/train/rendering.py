"""Render stores filled by background processes, for the stages to come while one trains."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaleweaver.toybox.progress import rendering_progress
from scaleweaver.toybox.store import LINES, cache_renders

POLL = 0.3  # seconds between two looks at what is done


class Renderers:
    """`count` processes that render stores in the order given; each store is written by one of them."""

    def __init__(self, stores: Iterable[Mapping[str, Any]], count: int) -> None:
        missing = list({store["path"]: dict(store) for store in stores if rendered(store) < store["count"]}.values())
        context = multiprocessing.get_context("spawn")  # a GPU does not survive a fork
        self.processes = [
            context.Process(target=_render, args=(missing[first::count], os.getpid()), daemon=True)
            for first in range(min(count, len(missing)))
        ]
        for process in self.processes:
            process.start()

    def wait(self, stores: Sequence[Mapping[str, Any]]) -> None:
        """Until these stores are complete; nothing to wait for without processes."""
        if not self.processes:
            return
        total = sum(store["count"] for store in stores)
        with rendering_progress("rendering") as on_progress:
            while (done := sum(rendered(store) for store in stores)) < total:
                if any(process.exitcode for process in self.processes):
                    raise RuntimeError(
                        "a process that renders has failed; its error is above, the same command goes on"
                    )
                on_progress(done, total)
                time.sleep(POLL)

    def close(self) -> None:
        """Ends them; what is rendered stays."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def rendered(store: Mapping[str, Any]) -> int:
    """How many pictures of a store are there."""
    lines = Path(store["path"]) / LINES
    return lines.read_bytes().count(b"\n") if lines.is_file() else 0


def _render(stores: Sequence[Mapping[str, Any]], parent: int) -> None:
    os.nice(10)  # the training comes first

    def with_parent(done: int, count: int) -> None:
        if os.getppid() != parent:  # it was killed, and a later run may write here
            os._exit(1)

    for store in stores:
        cache_renders(**{**store, "workers": 0}, on_progress=with_parent)  # a daemon has no processes of its own
