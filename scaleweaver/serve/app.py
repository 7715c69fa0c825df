"""The routes: OpenAI's images API, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scaleweaver import __version__
from scaleweaver.schedule import RATIOS, ScaleSchedule, infinity_schedule
from scaleweaver.serve.errors import ApiError, client_gone, internal, not_json
from scaleweaver.serve.service import Job, Service
from scaleweaver.serve.wire import RequestFields

logger = logging.getLogger(__name__)

GENERATIONS = "/v1/images/generations"
LAST_WORDS = 1.0  # seconds after the deadline in which a stream may still tell its error


def create_app(service: Service) -> FastAPI:
    """The application around a service, which starts and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    # the usual pages of documentation load scripts from elsewhere; /openapi.json is there
    app = FastAPI(title="scaleweaver", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Observer, service=service)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(HTTPException, _no_such_route)
    body = {"required": True, "content": {"application/json": {"schema": RequestFields.model_json_schema()}}}

    @app.post(GENERATIONS, openapi_extra={"requestBody": body})
    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt, with or without controls."""
        _authorise(request, service.options.api_key)
        _check_type(request)
        service.check_open()
        deadline = request.scope["started"] + service.options.timeout
        try:
            order = await service.read(request, deadline)
            request.scope["fields"] |= {"images": len(order.pictures), "seed": order.pictures[0].seed}
            job = service.accept(order, deadline)
            if order.stream:
                return EventStream(job)
            try:
                return Response(await job.answer(request), media_type="application/json")
            finally:
                job.close()
        except ClientDisconnect:
            raise client_gone() from None
        except ApiError:
            raise
        except Exception as error:
            logger.exception("a request failed")
            raise internal() from error

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The model that is served, its controls and its sizes."""
        _authorise(request, service.options.api_key)
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        """The model of this name."""
        _authorise(request, service.options.api_key)
        if name != service.name:
            message = f"the model {name!r} is not served here; there is {service.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return _model(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken, 503 once the server stops."""
        ready = service.batcher.alive and not service.draining
        state = "ok" if ready else "stopping" if service.draining else "stopped"
        facts = {"status": state, "model": service.name, "waiting": service.batcher.waiting}
        return JSONResponse(facts, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class EventStream(StreamingResponse):
    """The events of a job, which is closed however the connection ends.

    A client that does not read holds up what is sent to it: once the job's time is up, it is given up.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), self._job.left + LAST_WORDS)

        try:
            await super().stream_response(send_in_time)
        except asyncio.TimeoutError:
            logger.warning("a client does not read its stream, which is cut off")


class Observer:
    """Around every request: its id in and out, the number of those under way, one line in the log, its metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid4().hex
        fields: dict[str, Any] = {"request": name, "method": scope["method"], "path": scope["path"], "status": 499}
        scope["fields"] = fields
        scope["started"] = started = time.monotonic()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        work = scope["path"] == GENERATIONS and scope["method"] == "POST"
        self._service.active += work
        try:
            await self._app(scope, receive, send_named)
        finally:
            self._service.active -= work
            self._record(scope, fields, time.monotonic() - started, work)

    def _record(self, scope: Scope, fields: Mapping[str, Any], seconds: float, work: bool) -> None:
        metrics = self._service.metrics
        route = scope.get("route")  # paths that are none of ours count as one
        metrics.requests.labels(getattr(route, "path", "other"), str(fields["status"])).inc()
        if work:
            metrics.seconds.observe(seconds)
        level = logging.INFO if work or fields["status"] >= 400 else logging.DEBUG
        logger.log(level, "request", extra={"fields": {**fields, "seconds": round(seconds, 3)}})


def _authorise(request: Request, key: str | None) -> None:
    given = request.headers.get("authorization", "").encode("latin-1")
    if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise not_json(given)


def _model(service: Service) -> dict[str, Any]:
    config = service.pipe.config["schedule"]
    if "grids" in config:
        plans = [ScaleSchedule.from_dict(config)]
    else:
        plans = [infinity_schedule(ratio, config["budget"]) for ratio in RATIOS]
    return {
        "id": service.name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "scaleweaver",
        "controls": list(service.pipe.controls),
        "sizes": [f"{plan.width}x{plan.height}" for plan in plans],
        "scales": len(plans[0]),
    }


async def _failed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.code:
        request.scope["fields"]["code"] = error.code
    return JSONResponse(error.body, error.status, error.headers)


async def _no_such_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; there is POST {GENERATIONS}, GET /v1/models, ..."
    refused = ApiError(error.status_code, message, code="not_found", headers=dict(error.headers or {}))
    return await _failed(request, refused)
