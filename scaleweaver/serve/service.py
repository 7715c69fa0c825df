"""A request from its body to its answer; the event loop only waits, all work is done in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from fastapi import Request

from scaleweaver.serve import wire
from scaleweaver.serve.batching import Batcher
from scaleweaver.serve.bodies import Bodies
from scaleweaver.serve.drawing import Artist
from scaleweaver.serve.errors import ApiError, client_gone, closing, of_drawing, too_late
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.orders import Drawn, Event, Failed, Order, Preview
from scaleweaver.serve.reading import Reader

T = TypeVar("T")
KEEP_ALIVE = 15.0  # seconds after which a silent stream sends a comment, so that no proxy gives it up


class Service:
    """Owns all parts of a server around one pipeline."""

    def __init__(self, pipe: Any, options: ServeOptions) -> None:
        self.pipe, self.options = pipe, options
        self.metrics = Metrics()
        # in 16 bits nearly every picture of a batch would have to be drawn again alone
        self.alone = options.exact and pipe.transformer.dtype != torch.float32
        self.batcher = Batcher(
            Artist(pipe, self.metrics, options.exact).draw,
            self.metrics,
            most=1 if self.alone else options.max_batch,
            capacity=options.queue,
            wait=options.batch_wait,
        )
        self.active = 0
        self.draining = False
        self.started_at = int(time.time())
        self._reader = Reader(pipe, options)
        self._bodies = Bodies(options.max_body)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="scaleweaver-files")
        self.metrics.follow(lambda: self.batcher.waiting, lambda: self.active)

    def start(self) -> None:
        self.batcher.start()

    def close(self) -> None:
        """Finish what was accepted."""
        self.draining = True
        self.batcher.close()
        self._pool.shutdown()

    def check_open(self) -> None:
        """Raise the answer for a server that takes no new work, before a body is read."""
        if self.draining:
            raise closing()
        self.batcher.check_room()

    async def read(self, request: Request) -> Order:
        """The order in a request's body."""
        async with self._bodies.read(request) as body:
            return await self.in_pool(self._reader.read, body)

    def accept(self, order: Order) -> Job:
        """Queue all pictures of an order, or raise the answer for a full queue."""
        job = Job(self, order)
        self.batcher.submit(order.pictures)
        return job

    async def in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work that takes long in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


class Job:
    """An accepted order. It must be closed, which takes out of the queue what nobody waits for any more."""

    def __init__(self, service: Service, order: Order) -> None:
        self._service, self.order = service, order
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._deadline = time.monotonic() + service.options.timeout
        loop = asyncio.get_running_loop()
        for picture in order.pictures:
            picture.send = lambda event: _post(loop, self._events, event)

    def close(self) -> None:
        self._service.batcher.cancel(self.order.pictures)

    async def answer(self, request: Request) -> bytes:
        """The body of a plain answer; gives up when the client has gone."""
        gone = asyncio.ensure_future(_disconnect(request))
        work = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise client_gone()
        finally:
            gone.cancel()
            work.cancel()

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: previews as they come, every finished picture, or an error."""
        left = len(self.order.pictures)
        try:
            while left:
                event = await self._next(KEEP_ALIVE)
                if event is None:
                    yield b": still drawing\n\n"
                    continue
                left -= isinstance(event, Drawn)
                yield await self._service.in_pool(self._written, event)
        except ApiError as error:
            yield wire.event("error", error.body)

    async def _collect(self) -> bytes:
        drawn: dict[int, Drawn] = {}
        while len(drawn) < len(self.order.pictures):
            event = await self._next()
            if isinstance(event, Drawn):
                drawn[event.index] = event
        return await self._service.in_pool(self._body, [drawn[index] for index in sorted(drawn)])

    async def _next(self, patience: float | None = None) -> Preview | Drawn | None:
        """The next event, None after `patience` seconds; raises the answer for a failure or for the time being up."""
        left = self._deadline - time.monotonic()
        wait = left if patience is None else min(left, patience)
        try:
            event = await asyncio.wait_for(self._events.get(), max(wait, 0.0))
        except asyncio.TimeoutError:
            if wait < left:
                return None
            raise too_late(self._service.options.timeout) from None
        if isinstance(event, Failed):
            raise of_drawing(event.error)
        return event

    def _written(self, event: Preview | Drawn) -> bytes:
        image = wire.encode_picture(event.image, self.order)
        if isinstance(event, Preview):
            return wire.partial_event(self.order, event.index, event.scale, image)
        return wire.completed_event(self.order, event.index, image, event.tokens)

    def _body(self, drawn: list[Drawn]) -> bytes:
        images = [wire.encode_picture(one.image, self.order) for one in drawn]
        return wire.answer(self.order, images, sum(one.tokens for one in drawn))


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Put an event into a queue of the loop, from another thread; a loop that is over has nobody who waits."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _disconnect(request: Request) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
