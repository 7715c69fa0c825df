"""A request from its body to its answer; the event loop only waits, all work is done in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request

from scaleweaver.serve import wire
from scaleweaver.serve.batching import Batcher
from scaleweaver.serve.bodies import Bodies
from scaleweaver.serve.drawing import Artist
from scaleweaver.serve.errors import ApiError, client_gone, closing, of_drawing, too_late
from scaleweaver.serve.exact import measured_rounding
from scaleweaver.serve.metrics import Metrics
from scaleweaver.serve.options import ServeOptions, public_name
from scaleweaver.serve.orders import Drawn, Event, Failed, Order, Preview
from scaleweaver.serve.reading import Reader

T = TypeVar("T")
KEEP_ALIVE = 15.0  # seconds after which a silent stream sends a comment, so that no proxy gives it up
AHEAD = 8  # events of an order that may lie unread before previews are left out


class Service:
    """Owns all parts of a server around one pipeline."""

    def __init__(self, pipe: Any, options: ServeOptions) -> None:
        self.pipe, self.options = pipe, options
        self.name = options.name or public_name(pipe.name_or_path or "model")
        self.metrics = Metrics()
        rounding = (options.rounding or measured_rounding(pipe)) if options.exact else None
        # where nobody knows how far rounding goes, a batch could change bits
        self.alone = options.exact and rounding is None
        artist = Artist(pipe, self.metrics, name=self.name, rounding=rounding)
        self.batcher = Batcher(
            artist.draw,
            self.metrics,
            most=1 if self.alone else options.max_batch,
            capacity=options.queue,
            wait=options.batch_wait,
            rest=artist.forget,
        )
        self.active = 0
        self.draining = False
        self.started_at = int(time.time())
        self._reader = Reader(pipe, options, self.name)
        self._bodies = Bodies(options.max_body)
        # two of each: photos that take long to read hold up no finished picture
        self._reading = ThreadPoolExecutor(2, thread_name_prefix="scaleweaver-read")
        self._writing = ThreadPoolExecutor(2, thread_name_prefix="scaleweaver-write")
        self.metrics.follow(lambda: self.batcher.waiting, lambda: self.batcher.held, lambda: self.active)

    def start(self) -> None:
        self.batcher.start()

    def close(self) -> None:
        """Finish what was accepted."""
        self.draining = True
        self.batcher.close()
        self._writing.shutdown()
        self._reading.shutdown(wait=False)  # nobody waits for what is still read

    def check_open(self) -> None:
        """Raise the answer for a server that takes no new work, before a body is read."""
        if self.draining:
            raise closing()
        self.batcher.check_room()

    async def read(self, request: Request, deadline: float) -> Order:
        """The order in a request's body."""
        return await self.before(deadline, self._read(request))

    async def _read(self, request: Request) -> Order:
        async with self._bodies.read(request) as body:
            return await asyncio.get_running_loop().run_in_executor(self._reading, self._reader.read, body)

    def accept(self, order: Order, deadline: float) -> Job:
        """Queue all pictures of an order, or raise the answer for a full queue."""
        job = Job(self, order, deadline)
        self.batcher.submit(order.pictures)
        return job

    async def write(self, deadline: float, work: Callable[..., T], *arguments: Any) -> T:
        """Run work that makes an answer in another thread."""
        return await self.before(deadline, asyncio.get_running_loop().run_in_executor(self._writing, work, *arguments))

    async def before(self, deadline: float, work: Awaitable[T]) -> T:
        """What comes of work, or the answer for the time being up."""
        try:
            return await asyncio.wait_for(work, max(deadline - time.monotonic(), 0.0))
        except asyncio.TimeoutError:
            raise too_late(self.options.timeout) from None


class Job:
    """An accepted order. It must be closed, which makes room for others and drops what nobody waits for any more."""

    def __init__(self, service: Service, order: Order, deadline: float) -> None:
        self._service, self.order, self._deadline = service, order, deadline
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._closed = False
        loop = asyncio.get_running_loop()
        for picture in order.pictures:
            picture.send = lambda event: self._post(loop, event)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._service.batcher.release(self.order.pictures)

    @property
    def left(self) -> float:
        """Seconds until the answer must be out."""
        return max(self._deadline - time.monotonic(), 0.0)

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
                yield await self._service.write(self._deadline, self._written, event)
        except ApiError as error:
            yield wire.event("error", error.body)

    async def _collect(self) -> bytes:
        drawn: dict[int, Drawn] = {}
        while len(drawn) < len(self.order.pictures):
            event = await self._next()
            if isinstance(event, Drawn):
                drawn[event.index] = event
        return await self._service.write(self._deadline, self._body, [drawn[index] for index in sorted(drawn)])

    async def _next(self, patience: float | None = None) -> Preview | Drawn | None:
        """The next event, None after `patience` seconds; raises the answer for a failure or for the time being up."""
        left = self.left
        wait = left if patience is None else min(left, patience)
        try:
            event = await asyncio.wait_for(self._events.get(), wait)
        except asyncio.TimeoutError:
            if wait < left:
                return None
            raise too_late(self._service.options.timeout) from None
        if isinstance(event, Failed):
            raise of_drawing(event.error)
        return event

    def _post(self, loop: asyncio.AbstractEventLoop, event: Event) -> None:
        """Hand an event to the loop, from another thread."""
        with suppress(RuntimeError):  # of a loop that is over: nobody waits any more
            loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        """Keep an event until it is read; a client that reads slowly misses previews, not pictures."""
        if not isinstance(event, Preview) or self._events.qsize() < AHEAD:
            self._events.put_nowait(event)

    def _written(self, event: Preview | Drawn) -> bytes:
        image = wire.encode_picture(event.image, self.order)
        if isinstance(event, Preview):
            return wire.partial_event(self.order, event.index, event.scale, image)
        return wire.completed_event(self.order, event.index, image, event.tokens)

    def _body(self, drawn: list[Drawn]) -> bytes:
        images = [wire.encode_picture(one.image, self.order) for one in drawn]
        return wire.answer(self.order, images, sum(one.tokens for one in drawn))


async def _disconnect(request: Request) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
