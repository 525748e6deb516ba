"""An accepted request as an HTTP answer: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.choice import ChoiceDelta
from serve.engine_thread import EngineFailed
from serve.protocol.errors import engine_failed
from serve.protocol.logprobs import LogprobsWriter, Scored
from serve.protocol.requests import StreamOptions
from serve.protocol.responses import DONE, Progress, ResponseBuilder, usage
from serve.protocol.responses_answer import ResponsesBuilder, status_of
from serve.service import AcceptedRequest
from serve.tool_calls import add_to

T = TypeVar("T")
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """A stream that cancels its request however the stream ends, even if no event was sent."""

    def __init__(self, request: AcceptedRequest, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers=SSE_HEADERS)
        self.request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.request.close()


async def unless_disconnected(http: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work, which is cancelled when the client disconnects first; None then.

    When the caller is cancelled, a request that was accepted meanwhile is closed.
    """

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[T], asyncio.Task[None]] = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    except asyncio.CancelledError:
        result = None if tasks[0].cancelled() or tasks[0].exception() else tasks[0].result()
        if isinstance(result, AcceptedRequest):
            result.close()
        raise
    return None if tasks[0].cancelled() else tasks[0].result()


async def whole_answer(request: AcceptedRequest, builder: ResponseBuilder) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    empty = {"text": "", "logprobs": None, "finish_reason": None, "stop_reason": None}
    choices: list[dict[str, Any]] = [{"index": i, "calls": [], **empty} for i in range(request.choices)]
    scored: dict[int, list[Scored]] = {}
    progress = [Progress()] * len(choices)
    while deltas := await request.read():
        for delta in deltas:
            choice = choices[delta.index]
            choice["text"] += delta.text
            for call in delta.calls:
                add_to(choice["calls"], call)
            choice["finish_reason"], choice["stop_reason"] = delta.finish, delta.stop
            progress[delta.index] = delta.progress
            if delta.scored is not None:
                scored.setdefault(delta.index, []).extend(delta.scored)
    for index, tokens in scored.items():
        choices[index]["logprobs"] = _writer(request, builder, index).write(tokens)
    return builder.whole(choices, usage(request.prompt_tokens, progress))


def _writer(request: AcceptedRequest, builder: ResponseBuilder, index: int) -> LogprobsWriter:
    """What writes the log-probabilities of a choice, with those of its prompt if that is echoed."""
    prompt = [] if request.asked.echo else request.asked.requests[index].prompt
    return LogprobsWriter(request.asked.detokenizer, builder.chat, prompt)


async def events(
    request: AcceptedRequest, builder: ResponseBuilder, options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: one for each step of each choice, then `[DONE]`. Those of one step are sent together, as soon as it
    has ended.

    A step whose whole text is held back by the detokenizer has no event, unless it has log-probabilities or every chunk has
    to carry the usage.
    """
    options = options or StreamOptions()
    progress = [Progress()] * request.choices
    writers: dict[int, LogprobsWriter] = {}
    started: set[int] = set()

    def event(delta: ChoiceDelta) -> bytes:
        progress[delta.index] = delta.progress
        if not (delta.text or delta.calls or delta.finish or delta.scored or options.continuous_usage_stats):
            return b""
        logprobs = None
        if delta.scored is not None:
            if delta.index not in writers:
                writers[delta.index] = _writer(request, builder, delta.index)
            logprobs = writers[delta.index].write(delta.scored)
        first = b"" if delta.index in started else builder.first_chunk(delta.index)
        started.add(delta.index)
        so_far = usage(request.prompt_tokens, progress) if options.continuous_usage_stats else None
        request.metrics.delivered(time.perf_counter() - delta.stamp)
        return first + builder.chunk(delta.index, delta.text, delta.calls, logprobs, delta.finish, delta.stop, so_far)

    try:
        while deltas := await request.read():
            if chunks := b"".join(map(event, deltas)):
                yield chunks
        if options.include_usage:
            yield builder.usage_chunk(usage(request.prompt_tokens, progress))
    except EngineFailed as error:  # the status line has been sent, so the stream itself carries the error
        yield b"data: " + bytes(engine_failed(error).response().body) + b"\n\n"
    yield DONE


async def whole_response(request: AcceptedRequest, builder: ResponsesBuilder) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    finish, progress = None, Progress()
    while deltas := await request.read():
        for delta in deltas:
            finish, progress = delta.finish, delta.progress
            for part in delta.parts:
                builder.grow(part)
    used = usage(request.prompt_tokens, [progress])
    builder.closing(finish, used)
    return builder.answer(status_of(finish), used)


async def response_events(request: AcceptedRequest, builder: ResponsesBuilder) -> AsyncGenerator[bytes, None]:
    """The events of a response: an opening, some for each step with text or calls, and a closing that repeats the whole."""
    finish, progress = None, Progress()
    yield builder.opening()
    try:
        while deltas := await request.read():
            for delta in deltas:
                finish, progress = delta.finish, delta.progress
                if delta.parts:
                    request.metrics.delivered(time.perf_counter() - delta.stamp)
                    yield b"".join(map(builder.grow, delta.parts))
        yield builder.closing(finish, usage(request.prompt_tokens, [progress]))
    except EngineFailed as error:  # the status line has been sent, so the stream itself carries the error
        yield builder.failed(engine_failed(error))
