"""HTTP around a `Service`: routes, server-sent events, errors in OpenAI's shape."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import protocol
from serve.engine_thread import EngineFailed
from serve.protocol import ApiError, AsciiJSON, ChatRequest, CompletionRequest, Shape
from serve.service import Job, Service, merged

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": protocol.ErrorResponse} for code in (400, 401, 404, 413, 429, 500, 503)
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    **ERRORS,
}
OPEN = ("/health", "/live", "/metrics")
"""Paths that ask for no key."""
SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(service: Service, api_key: str | None, max_body: int, scrape: Callable[[], Awaitable[str]]) -> ASGIApp:
    """The whole endpoint as an ASGI application.

    Args:
        api_key: wanted on all paths but `OPEN`; None for none.
        max_body: bytes of a request.
        scrape: gives the text of /metrics.
    """
    app = FastAPI(title="kforcing", version="1")

    @app.post("/v1/completions", response_model=protocol.CompletionResponse, responses=ANSWERS)
    async def completions(body: CompletionRequest) -> Response:
        """Continue prompts. With `stream`, server-sent events that end with `data: [DONE]`."""
        return await answer(body, chat=False)

    @app.post("/v1/chat/completions", response_model=protocol.ChatResponse, responses=ANSWERS)
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation, for models with a chat template."""
        return await answer(body, chat=True)

    async def answer(body: CompletionRequest | ChatRequest, chat: bool) -> Response:
        job = await service.accept(body)
        shape = Shape(chat, job.model.name)
        if body.stream:
            return JobStream(job, stream(job, shape, body))
        try:
            return AsciiJSON(await collect(job, shape))
        finally:
            job.close()

    @app.get("/v1/models", response_model=protocol.ModelList, responses={401: ERRORS[401]})
    async def models() -> Response:
        """What is served."""
        return AsciiJSON({"object": "list", "data": [card(name) for name in service.models]})

    @app.get(
        "/v1/models/{name:path}", response_model=protocol.ModelCard, responses={401: ERRORS[401], 404: ERRORS[404]}
    )
    async def one_model(name: str) -> Response:
        """One of them."""
        service.model(name)
        return AsciiJSON(card(name))

    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        engine = service.models[name].engine
        facts = {"max_model_len": engine.max_model_len, "k": engine.k}
        return {"id": name, "object": "model", "created": started, "owned_by": "kforcing", **facts}

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Response:
        """Readiness: every model has proved a forward pass within the last seconds."""
        try:
            await service.prove()
        except RuntimeError as error:
            return ApiError(503, str(error), code="not_ready").response()
        return AsciiJSON({"status": "ok"})

    @app.get("/live")
    async def live() -> Response:
        """Liveness: this process answers. Says nothing of the models."""
        return AsciiJSON({"status": "ok"})

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text, of all replicas."""
        return PlainTextResponse(await scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    answer_errors(app)
    without_422(app)
    return Gate(app, api_key, max_body)


def answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(EngineFailed)
    async def failed(request: Request, error: EngineFailed) -> Response:
        return ApiError(503, str(error), code="engine_failed").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # What comes after a field's name in a place may be pydantic's name of a type that was tried.
        field = next((str(part) for part in first["loc"] if part != "body"), None)
        message = str(first["msg"]).removeprefix("Value error, ")
        return ApiError(400, f"{field or 'body'}: {message}", field).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()


def without_422(app: FastAPI) -> None:
    """FastAPI's document, without the answer 422 that is never given here."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


class JobStream(StreamingResponse):
    """A stream that cancels its job however it ends, even before the first event was asked for."""

    def __init__(self, job: Job, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers=SSE)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


async def collect(job: Job, shape: Shape) -> dict[str, Any]:
    """The whole answer."""
    choices: list[dict[str, Any]] = [
        {"index": i, "text": "", "finish_reason": None, "stop_reason": None} for i in range(len(job.choices))
    ]
    tokens = [0] * len(choices)
    async with aclosing(merged(job.choices)) as events:
        async for event in events:
            choice = choices[event.index]
            choice["text"] += event.text
            choice["finish_reason"], choice["stop_reason"] = event.finish, event.stop
            tokens[event.index] = event.tokens
    return shape.whole(choices, protocol.usage(job.prompt_tokens, sum(tokens)))


async def stream(job: Job, shape: Shape, body: CompletionRequest | ChatRequest) -> AsyncGenerator[bytes, None]:
    """Server-sent events, one for each step of each choice, as soon as the step has ended."""
    options = body.stream_options
    always, last = bool(options and options.continuous_usage_stats), bool(options and options.include_usage)
    tokens = [0] * len(job.choices)
    opened = [False] * len(job.choices)
    try:
        async with aclosing(merged(job.choices)) as events:
            async for event in events:
                tokens[event.index] = event.tokens
                if not (event.text or event.finish or always):
                    continue  # all of it is held back
                chunks = b""
                if not opened[event.index]:
                    opened[event.index] = True
                    chunks = shape.opening(event.index) or b""
                usage = protocol.usage(job.prompt_tokens, sum(tokens)) if always else None
                chunks += shape.chunk(event.index, event.text, event.finish, event.stop, usage)
                job.model.metrics.delivered(time.perf_counter() - event.stamp)
                yield chunks
        if last:
            yield shape.closing(protocol.usage(job.prompt_tokens, sum(tokens)))
    except EngineFailed as error:  # headers have gone; the stream itself has to say it
        yield b"data: " + bytes(ApiError(503, str(error), code="engine_failed").response().body) + b"\n\n"
    yield protocol.DONE


class Gate:
    """Before anything is parsed: the key, on all paths but those of probes and scrapers, and the size of the body."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int):
        self.app, self.api_key, self.max_body = app, api_key, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            first = await self._read(receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)

        async def replay() -> Message:
            """The body that was read, then what the server says (that the client has gone)."""
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            return await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.api_key is None or path in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise ApiError(401, "this endpoint needs a key: send Authorization: Bearer KEY", code="invalid_api_key")

    async def _read(self, receive: Receive) -> Message | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise ApiError(413, f"the request is larger than {self.max_body} bytes", code="request_too_large")
            if not message.get("more_body"):
                return {"type": "http.request", "body": body, "more_body": False}
