"""Bodies of requests, refused while they come in where they are too large, too many or too slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from scaleweaver.serve.errors import ApiError, bodies_full

AT_ONCE = 8  # largest bodies that may be held at the same time
SECONDS = 30.0  # for one body


class Bodies:
    """Receives bodies of up to `limit` bytes, and of eight times that together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the block ends."""
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            try:
                await asyncio.wait_for(self._collect(request, parts), SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body took more than {SECONDS:g} s; send it faster", code="timeout") from None
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _collect(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._limit:
                raise self._too_large()
            if self._held + len(part) > AT_ONCE * self._limit:
                raise bodies_full()
            self._held += len(part)
            parts.append(part)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limit:,} bytes; send smaller pictures"
        return ApiError(413, message, code="request_too_large")
