"""The paths of the endpoint."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from kforcing.version import __version__
from serve.protocol.errors import ERROR_RESPONSES, ApiError, AsciiJSON
from serve.protocol.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from serve.protocol.responses import (
    ChatResponse,
    CompletionResponse,
    Detokenized,
    ModelCard,
    ModelList,
    ResponseBuilder,
    Tokens,
    Version,
)
from serve.protocol.responses_answer import ResponsesAnswer, ResponsesBuilder
from serve.protocol.responses_request import ResponsesRequest, named_here
from serve.service import AcceptedRequest, Service
from serve.streaming import (
    EventStream,
    events,
    response_events,
    unless_disconnected,
    whole_answer,
    whole_response,
)

Responses = dict[int | str, dict[str, Any]]
GENERATION_RESPONSES: Responses = {200: {"content": {"text/event-stream": {}}}, **ERROR_RESPONSES}
UNAUTHORIZED: Responses = {401: ERROR_RESPONSES[401]}


def generation_routes(service: Service) -> APIRouter:
    """/v1/completions, /v1/chat/completions and /v1/responses."""
    router = APIRouter(responses=GENERATION_RESPONSES)

    @router.post("/v1/completions", response_model=CompletionResponse)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue prompts. With `stream`, the answer is server-sent events that end with `data: [DONE]`."""
        return await completed(body, http, chat=False)

    @router.post("/v1/chat/completions", response_model=ChatResponse)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """Continue a conversation, if the model has a chat template."""
        return await completed(body, http, chat=True)

    @router.post("/v1/responses", response_model=ResponsesAnswer)
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        """Answer as OpenAI's Responses API does. With `stream`, the answer is its events."""

        def builder(request: AcceptedRequest) -> ResponsesBuilder:
            return ResponsesBuilder(request.model, body)

        try:
            return await answer(
                body.as_chat(),
                http,
                whole=lambda request: whole_response(request, builder(request)),
                streamed=lambda request: response_events(request, builder(request)),
            )
        except ApiError as error:
            raise named_here(error) from None

    async def completed(body: CompletionRequest | ChatRequest, http: Request, chat: bool) -> Response:
        def builder(request: AcceptedRequest) -> ResponseBuilder:
            return ResponseBuilder(chat, request.model)

        return await answer(
            body,
            http,
            whole=lambda request: whole_answer(request, builder(request)),
            streamed=lambda request: events(request, builder(request), body.stream_options),
        )

    async def answer(
        body: CompletionRequest | ChatRequest,
        http: Request,
        whole: Callable[[AcceptedRequest], Coroutine[Any, Any, dict[str, Any]]],
        streamed: Callable[[AcceptedRequest], AsyncGenerator[bytes, None]],
    ) -> Response:
        client = http.headers.get("authorization", "")
        if (request := await unless_disconnected(http, service.accept(body, client))) is None:
            return Response()
        if body.stream:
            return EventStream(request, streamed(request))
        try:
            body_of_answer = await unless_disconnected(http, whole(request))
        finally:
            request.close()
        return Response() if body_of_answer is None else AsciiJSON(body_of_answer)

    return router


def model_routes(service: Service) -> APIRouter:
    """/v1/models and /v1/models/NAME."""
    router = APIRouter(responses=UNAUTHORIZED)
    started = int(time.time())

    def card(name: str) -> dict[str, Any]:
        engine = service.model(name).engine
        facts = {"max_model_len": engine.max_model_len, "k": engine.k, "acceptance": engine.config.acceptance}
        facts["chat_template"] = bool(getattr(service.model(name).tokenizer, "chat_template", None))
        return {"id": name, "object": "model", "created": started, "owned_by": "kforcing", **facts}

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """List the models that are served."""
        await service.wait_for_models()
        return AsciiJSON({"object": "list", "data": [card(name) for name in service.models]})

    @router.get(
        "/v1/models/{name:path}",
        response_model=ModelCard,
        responses={code: ERROR_RESPONSES[code] for code in (404, 503)},
    )
    async def one_model(name: str) -> Response:
        """Describe one model."""
        await service.wait_for_models()
        return AsciiJSON(card(name))

    return router


def tokenizer_routes(service: Service) -> APIRouter:
    """/tokenize and /detokenize, as vLLM has them."""
    router = APIRouter(responses={code: ERROR_RESPONSES[code] for code in (400, 401, 404, 413, 503)})

    @router.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Return the tokens that a prompt or a conversation has in a request."""
        model, ids = await service.tokenise(body)
        texts = [model.detokenizer.token(id)[0] for id in ids]
        counts = {"count": len(ids), "max_model_len": model.engine.max_model_len}
        return AsciiJSON({**counts, "tokens": ids, "token_strs": texts})

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Return the text of tokens, special tokens included."""
        await service.wait_for_models()
        model = service.model(body.model)
        if len(body.tokens) > model.engine.max_model_len:
            message = f"{len(body.tokens)} tokens exceed the context of {model.engine.max_model_len} tokens"
            raise ApiError(400, message, "tokens")
        return AsciiJSON({"prompt": model.literal.decode(body.tokens)})

    return router


def operations_routes(service: Service, scrape: Callable[[], Awaitable[str]]) -> APIRouter:
    """/health, /live, /version and /metrics."""
    router = APIRouter()

    @router.get("/health", responses={503: ERROR_RESPONSES[503]})
    async def health() -> Response:
        """Readiness: 200 if every model has run a forward pass within the last seconds."""
        try:
            await service.check_ready()
        except RuntimeError as error:
            return ApiError(503, str(error), code="not_ready").response()
        failed = {} if service.failed_deployment is None else {"failed_deployment": service.failed_deployment}
        return AsciiJSON({"status": "ok", **failed})

    @router.get("/live")
    async def live() -> Response:
        """Liveness: 200 if this process answers. The state of the models has no influence."""
        return AsciiJSON({"status": "ok"})

    @router.get("/version", response_model=Version, responses=UNAUTHORIZED)
    async def version() -> Response:
        """Return the version of this software."""
        return AsciiJSON({"version": __version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics of all replicas in Prometheus' text format."""
        return PlainTextResponse(await scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
