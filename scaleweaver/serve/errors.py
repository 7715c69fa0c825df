"""What a client is told when a request fails, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer other than 200; `param` is the field at fault, `code` is for programs, `message` says what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_drawing(error: Exception) -> ApiError:
    """The pipeline refuses arguments with a ValueError that says what to pass; all else is ours."""
    return ApiError(400, str(error), code="invalid_value") if isinstance(error, ValueError) else internal()


def internal() -> ApiError:
    return ApiError(500, "the request failed; the server's log says why", code="internal_error")


def client_gone() -> ApiError:
    """Nobody reads this one; it is what the log shows."""
    return ApiError(499, "the client has closed the connection", code="client_closed")


def queue_full(seconds: int) -> ApiError:
    """As many pictures are accepted as may be."""
    return _busy("the queue is full", "queue_full", seconds)


def bodies_full() -> ApiError:
    """Bodies of other requests take all the memory that bodies may have."""
    return _busy("too many large requests come in at once", "bodies_full", 1)


def _busy(what: str, code: str, seconds: int) -> ApiError:
    return ApiError(429, f"{what}; try again in {seconds} s", code=code, headers={"Retry-After": str(seconds)})


def not_json(given: str) -> ApiError:
    """A page of another site can make a browser send other types without asking, but not this one."""
    message = f"Content-Type is {given!r}; send the body as application/json"
    return ApiError(415, message, code="unsupported_media_type")


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down and takes no new work", code="shutting_down")


def too_late(seconds: float) -> ApiError:
    """Asked again at once, it would only add to the load: clients that know this header do not."""
    return ApiError(
        504,
        f"not drawn within {seconds:g} s; ask for fewer pictures, or try later",
        code="timeout",
        headers={"x-should-retry": "false"},
    )
