"""Listening, and an end that finishes what was accepted."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from scaleweaver.serve.app import create_app
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.service import Service

logger = logging.getLogger(__name__)

LogForm = Literal["text", "json"]


def bind(host: str, port: int) -> socket.socket:
    """The address taken, before anything slow happens; nobody is let in yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); pass another --host or --port") from None
    return listener


def serve(pipe: Any, options: ServeOptions, listener: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl+C; then finish what was accepted. A second signal does not wait."""
    service = Service(pipe, options)
    if service.alone and options.max_batch > 1:
        logger.warning(
            "drawing one by one: how far a batch moves logits on %s in %s was not measured; pass --dtype float32 on"
            " a CPU, --rounding with what benchmarks/serve.py finds, or --no-exact",
            pipe._execution_device.type,
            str(pipe.transformer.dtype).removeprefix("torch."),
        )
    Server(service).run(sockets=[listener])
    logger.info("stopped")


@contextmanager
def running(pipe: Any, options: ServeOptions | None = None, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread of this process for as long as the block; gives its address, http://HOST:PORT."""
    listener = bind(host, port)
    server = Server(Service(pipe, options or ServeOptions()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="scaleweaver-serve")
    url = _url(listener)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.01)
        if not server.started:
            raise RuntimeError("the server did not start; its log says why")
        yield url
    finally:
        server.end()
        thread.join()


class Server(uvicorn.Server):
    """A server that, told to end, answers 503 to new work until all that was accepted is done; told again, it ends."""

    def __init__(self, service: Service) -> None:
        patience = service.options.timeout
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=_connection(patience),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(patience),
            )
        )
        self.service = service
        self.ending = False

    def end(self) -> None:
        """Take no new work, and stop once there is none left."""
        self.service.draining = self.ending = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        urls = [_url(listener) for listener in sockets or []]
        logger.info("listening", extra={"fields": {"url": ",".join(urls), "model": self.service.name}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.ending:
            super().handle_exit(sig, frame)
            self.force_exit = True
        self.end()

    async def on_tick(self, counter: int) -> bool:
        if self.ending and self.service.active == 0:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ended = asyncio.ensure_future(super().shutdown(sockets))
        while not ended.done() and not self.force_exit:
            await asyncio.wait({ended}, timeout=0.1)
        # what nobody has read by now is dropped
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await ended


def _connection(patience: float) -> type[H11Protocol]:
    """HTTP on connections that are cut off when a client leaves an answer unread for so many seconds."""

    class Connection(H11Protocol):
        _cut: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cut = self.loop.call_later(patience, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._keep()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._keep()

        def _keep(self) -> None:
            if self._cut is not None:
                self._cut.cancel()

    return Connection


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr(form: LogForm = "text") -> None:
    """Lines of this package and warnings of uvicorn on stderr, as text or as one JSON object each."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(form))
    for name, level in (("scaleweaver", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)


class Lines(logging.Formatter):
    """Time, level, message and the `fields` of a record."""

    def __init__(self, form: LogForm) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._json:
            known = {"time": stamp, "level": record.levelname.lower(), "message": record.getMessage()}
            return json.dumps({**known, **fields}, default=str)
        trace = fields.pop("trace", None)
        named = (f"{name}={_word(value)}" for name, value in fields.items())
        words = [stamp, record.levelname.lower(), record.getMessage(), *named]
        return " ".join(words) + (f"\n{trace}" if trace else "")


def _word(value: Any) -> str:
    """A value as one word of a line: a path out of a request must not begin another line, or another field."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
