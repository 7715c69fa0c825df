"""How the server gets rid of clients that do not read, how it ends, and what its log may say."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from loops import run_apart
from serve_clients import get, head, held, post, until
from tiny_pipeline import PROMPT, tiny_pipeline

from scaleweaver.pipeline import VARControlPipeline
from scaleweaver.serve.app import EventStream
from scaleweaver.serve.options import ServeOptions
from scaleweaver.serve.reading import Reader
from scaleweaver.serve.server import Lines, LogForm, Server, bind
from scaleweaver.serve.service import AHEAD, Job, Service

BUFFER = 4096  # bytes that the system keeps of what is sent and not read
LONG = 20_000  # characters of a prompt, which every picture repeats among its settings


@pytest.fixture(scope="module")
def pipe() -> VARControlPipeline:
    return tiny_pipeline()


@contextmanager
def started(pipe: VARControlPipeline, options: ServeOptions) -> Iterator[tuple[Server, threading.Thread, int]]:
    """A server, its thread and its port; whatever comes, it is gone after the block."""
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # its connections have it from here
    server = Server(Service(pipe, options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server, thread, listener.getsockname()[1]
    finally:
        server.force_exit = server.should_exit = True
        thread.join(20)
        server.service.close()


@contextmanager
def silent_client(port: int, **fields: object) -> Iterator[None]:
    """Somebody who sends a request and reads nothing of the answer."""
    body = json.dumps(fields).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.connect(("127.0.0.1", port))
        client.sendall(head(len(body)) + body)
        yield


def drawn(server: Server) -> float:
    return server.service.metrics.registry.get_sample_value("scaleweaver_images_total") or 0.0


def test_a_client_that_never_reads_its_stream_is_cut_off(pipe: VARControlPipeline) -> None:
    with (
        started(pipe, ServeOptions(timeout=2.0, queue=10)) as (server, _, port),
        silent_client(port, prompt="x" * LONG, n=10, stream=True),
    ):
        until(lambda: drawn(server) == 10)
        # pictures that nobody took are still there, so there is no room for more
        assert post(f"http://127.0.0.1:{port}", {"prompt": PROMPT})[1]["error"]["code"] == "queue_full"
        until(lambda: server.service.active == server.service.batcher.held == 0)
        until(lambda: not server.server_state.connections)
        assert post(f"http://127.0.0.1:{port}", {"prompt": PROMPT})[0] == 200


def test_the_end_does_not_wait_for_ever_for_an_answer_to_be_read(pipe: VARControlPipeline) -> None:
    with (
        started(pipe, ServeOptions(timeout=1.0)) as (server, thread, port),
        silent_client(port, prompt="x" * LONG),
    ):
        until(lambda: drawn(server) == 1 and server.service.active == 0)
        assert server.server_state.connections  # the rest of the answer lies there
        server.end()
        thread.join(10)
        assert not thread.is_alive()


def test_a_second_signal_does_not_wait(pipe: VARControlPipeline) -> None:
    with (
        held(pipe) as hold,
        started(pipe, ServeOptions()) as (server, thread, port),
        silent_client(port, prompt=PROMPT),
    ):
        assert hold.begun.wait(10)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: get(f"http://127.0.0.1:{port}/health")[0] == 503)
        thread.join(0.5)
        assert thread.is_alive()
        server.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        assert not thread.is_alive() and not hold.go.is_set()
        hold.go.set()


async def accepted(service: Service, **fields: object) -> Job:
    body = json.dumps({"prompt": PROMPT, **fields}).encode()
    order = Reader(service.pipe, service.options, service.name).read(body)
    return service.accept(order, time.monotonic() + service.options.timeout)


@contextmanager
def drawing(pipe: VARControlPipeline, options: ServeOptions) -> Iterator[Service]:
    service = Service(pipe, options)
    service.start()
    try:
        yield service
    finally:
        service.close()


def test_a_stream_ends_with_its_time_though_nothing_can_be_sent(pipe: VARControlPipeline) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def stream(service: Service) -> None:
        answer = EventStream(await accepted(service, n=2, stream=True))
        assert service.batcher.held == 2
        await asyncio.wait_for(answer({"type": "http", "asgi": {"spec_version": "2.3"}}, never, never), 10)
        assert service.batcher.held == 0

    with drawing(pipe, ServeOptions(timeout=0.2)) as service:
        run_apart(stream(service))


def test_previews_that_nobody_takes_are_left_out(pipe: VARControlPipeline) -> None:
    async def late(service: Service) -> str:
        job = await accepted(service, n=10, stream=True, partial_images=3)
        while not all(picture.over for picture in job.order.pictures):
            await asyncio.sleep(0.01)
        try:
            return b"".join([event async for event in job.stream()]).decode()
        finally:
            job.close()

    with drawing(pipe, ServeOptions()) as service:
        events = run_apart(late(service))
    assert events.count("event: image_generation.completed") == 10
    assert 0 < events.count("event: image_generation.partial_image") <= AHEAD


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_path_forges_no_line_and_no_field_of_the_log(form: LogForm) -> None:
    record = logging.LogRecord("scaleweaver", logging.INFO, "", 0, "request", None, None)
    record.fields = {"path": "/\n2026-01-01 info request status=200\u2028", "status": 404}
    line = Lines(form).format(record)
    assert len(line.splitlines()) == 1
    if form == "text":
        assert line.endswith('path="/\\n2026-01-01 info request status=200\\u2028" status=404')
    else:
        assert json.loads(line)["path"] == record.fields["path"]
