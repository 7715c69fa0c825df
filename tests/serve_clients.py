"""What the tests of the server send, how they hold it up, and how they compare what comes back."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from openai import OpenAI
from PIL import Image

from scaleweaver.metadata import read_settings
from scaleweaver.pipeline import VARControlPipeline

JSON = {"Content-Type": "application/json"}


def client(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def b64(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def picture(text: str | None) -> Image.Image:
    assert text is not None
    opened = Image.open(io.BytesIO(base64.b64decode(text)))
    opened.load()
    return opened


def assert_same(text: str | None, expected: Image.Image, model: str = "model") -> None:
    """The same pixels, made by the same settings of the model that the server has under this name."""
    got = picture(text)
    assert np.array_equal(np.asarray(got), np.asarray(expected))
    assert read_settings(got) == {**read_settings(expected), "model": model}


def post(url: str, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of a plain request, whatever the status."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = JSON | {name.replace("_", "-").title(): value for name, value in headers.items()}
    try:
        with urlopen(Request(f"{url}/v1/images/generations", data, named), timeout=30) as answer:
            return answer.status, json.load(answer), {k.lower(): v for k, v in answer.headers.items()}
    except HTTPError as error:
        return error.code, json.load(error), {k.lower(): v for k, v in error.headers.items()}


def head(length: int) -> bytes:
    """The first lines of a request for pictures whose body has so many bytes."""
    kind = "Content-Type: application/json"
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: here", kind, f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def metric(url: str, name: str) -> float:
    """The value of one line of /metrics."""
    lines = dict(line.rsplit(" ", 1) for line in get(f"{url}/metrics")[1].splitlines() if not line.startswith("#"))
    return float(lines[name])


@dataclass(frozen=True)
class Hold:
    """begun: somebody waits here; go: let them all go."""

    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def wait(self, *_: Any) -> None:
        self.begun.set()
        assert self.go.wait(20)


@contextmanager
def held(pipe: VARControlPipeline) -> Iterator[Hold]:
    """The network waits with its first step until it may go."""
    hold = Hold()
    hook = pipe.transformer.register_forward_pre_hook(hold.wait)
    try:
        yield hold
    finally:
        hold.go.set()
        hook.remove()


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
