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


def overloaded(seconds: int) -> ApiError:
    """No room in the queue."""
    return ApiError(
        429,
        f"the queue is full; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


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
