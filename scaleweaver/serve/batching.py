"""A bounded queue of pictures and the one thread that draws them, compatible ones together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from scaleweaver.serve.errors import closing, queue_full
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.orders import Failed, Picture

logger = logging.getLogger(__name__)

IDLE = 10.0  # seconds without work after which `rest` is called


class Batcher:
    """Takes pictures from any thread and calls `draw` with batches from its own.

    The picture that has waited longest is always in the next batch; those with the same settings join it in the order
    they came. A picture takes up room until it is released, drawn or not, since until then it is in memory.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Picture]], None],
        metrics: Metrics,
        *,
        most: int,
        capacity: int,
        wait: float,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._draw, self._rest, self._metrics = draw, rest, metrics
        self._most, self._capacity, self._wait = most, capacity, wait
        self._waiting: list[Picture] = []
        self._held = 0
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 1.0  # seconds a picture, as the last batches had it
        self._thread = threading.Thread(target=self._run, name="scaleweaver-draw", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Draw what was accepted, take nothing more, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> int:
        """Pictures that were submitted and not yet released."""
        return self._held

    def check_room(self, pictures: int = 1) -> None:
        """Raise the answer for a queue that has no room for so many more."""
        if self._held + pictures > self._capacity:
            raise queue_full(min(60, max(1, math.ceil(self.waiting * self._pace))))

    def submit(self, pictures: Sequence[Picture]) -> None:
        """All of an order's pictures, or none and an `ApiError`."""
        with self._changed:
            if self._closing:
                raise closing()
            self.check_room(len(pictures))
            self._held += len(pictures)
            self._waiting += pictures
            self._changed.notify_all()

    def release(self, pictures: Sequence[Picture]) -> None:
        """Nobody waits for these submitted pictures any more: those that are not begun leave the queue."""
        with self._changed:
            self._held -= len(pictures)
            for picture in pictures:
                if not picture.over:
                    picture.cancelled = True
                    self._metrics.cancelled.inc()
            self._waiting = [picture for picture in self._waiting if not picture.cancelled]
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next():
            started = time.monotonic()
            self._attempt(batch)
            self._pace += 0.3 * ((time.monotonic() - started) / len(batch) - self._pace)

    def _next(self) -> list[Picture]:
        """The next batch, taken out of the queue; empty at the end."""
        with self._changed:
            while self._waiting or not self._closing:
                if not self._waiting:
                    if not self._changed.wait(IDLE):
                        self._rest()
                    continue
                first = self._waiting[0]
                batch = [picture for picture in self._waiting if picture.settings == first.settings][: self._most]
                left = first.arrived + self._wait - time.monotonic()
                if len(batch) == self._most or left <= 0 or self._closing:
                    taken = set(map(id, batch))
                    self._waiting = [picture for picture in self._waiting if id(picture) not in taken]
                    return batch
                self._changed.wait(left)
        return []

    def _attempt(self, batch: Sequence[Picture]) -> None:
        """Draw; pictures of a batch that fails are drawn one by one, so that none fails for another's sake."""
        try:
            self._draw(batch)
        except Exception as error:
            # the thread outlives whatever a picture does to it: its order gets the error
            left = [picture for picture in batch if not picture.over and not picture.cancelled]
            if len(batch) == 1:
                if not isinstance(error, ValueError):
                    logger.exception("a picture could not be drawn")
                for picture in left:
                    picture.finish(Failed(picture.index, error))
                return
            logger.warning("a batch failed, drawing one by one", extra={"fields": {"error": str(error)}})
            for picture in left:
                self._attempt([picture])
