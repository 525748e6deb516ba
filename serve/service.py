"""What a replica does for its clients, without HTTP and without Ray: requests in, pieces of text out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kforcing.detokenizer import TextStream
from kforcing.engine import Request, SamplingParams
from kforcing.noise import derive_key
from serve.engine_thread import EngineFailed, Overloaded, Ticket, Worker
from serve.metrics import Metrics
from serve.models import ServedModel, load_all, loading
from serve.protocol import MAX_CHOICES, ApiError, ChatRequest, CompletionRequest
from serve.settings import Settings

STUCK_S = 120.0
"""A step that takes longer counts as dead."""
PROOF_S = 10.0
"""Age at which readiness renews the proof of a forward pass."""

CHARACTERS = 100
"""Characters of a token at most, as far as refusing prompts unread goes."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Event:
    """What happened to one choice of a request."""

    index: int
    text: str
    tokens: int
    finish: str | None
    stop: str | int | None
    stamp: float
    """`time.perf_counter` at the end of the step that made it."""


@dataclass
class Job:
    """An accepted request: its choices, each an iterator of events."""

    model: ServedModel
    prompt_tokens: int
    choices: list[AsyncGenerator[Event, None]]
    tickets: list[Ticket]

    def close(self) -> None:
        """Cancel what has not ended."""
        for ticket in self.tickets:
            self.model.loop.cancel(ticket)


class Service:
    """Models of a replica and what can be asked of them."""

    def __init__(self, replica: str):
        self.replica = replica
        self.metrics = Metrics()
        self.worker = Worker()
        self.settings: Settings | None = None
        self.models: dict[str, ServedModel] = {}
        self._swap = asyncio.Lock()

    async def configure(self, settings: Settings) -> None:
        """Serve these models from now on; what the former ones have begun, they finish. Safe to repeat."""
        async with self._swap:
            if self.settings is not None and loading(settings) == loading(self.settings):
                self.settings = settings
                for model in self.models.values():
                    model.loop.max_waiting = settings.max_waiting
                return
            # In a thread that ends with it, and its OpenMP team with that (see loop.py).
            with ThreadPoolExecutor(1, "load") as once:
                future = once.submit(load_all, settings, self.metrics, self.replica, self.worker)
                models = await asyncio.wrap_future(future)
            former, self.models, self.settings = self.models, models, settings
            for model in former.values():
                model.loop.close()
            logger.info("serving %s", ", ".join(f"{n} (k={m.engine.k})" for n, m in models.items()))

    def check_alive(self) -> None:
        """Raise RuntimeError when an engine has died or hangs."""
        for name, model in self.models.items():
            if not model.loop.alive:
                raise RuntimeError(f"the engine of {name} has stopped: {model.loop.failure}")
            if model.loop.stuck_for() > STUCK_S:
                raise RuntimeError(f"the engine of {name} has not finished a step for {model.loop.stuck_for():.0f} s")

    async def prove(self) -> None:
        """Raise RuntimeError unless every model has shown a forward pass lately; make one where nothing runs."""
        self.check_alive()
        if not self.models:
            raise RuntimeError("no model has been loaded yet")
        for name, model in list(self.models.items()):
            if model.loop.pending or time.monotonic() - model.proved < PROOF_S:
                continue
            try:
                (ticket,) = model.loop.submit([Request([0], 1, k=1)])
                model.metrics.probed()
                async with aclosing(model.loop.follow(ticket)) as outputs:
                    await asyncio.wait_for(anext(outputs), STUCK_S)
            except (asyncio.TimeoutError, EngineFailed) as error:
                if self.models.get(name) is model:  # and was not replaced meanwhile
                    raise RuntimeError(f"{name} does not decode: {error}") from None
            except Overloaded:
                pass  # busy is alive
            model.proved = time.monotonic()

    def model(self, name: str | None) -> ServedModel:
        """The model of that name, or the first. Raises ApiError."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"model {name!r} is not served here; there are: {known}", "model", "model_not_found")
        return self.models[name]

    async def accept(self, body: CompletionRequest | ChatRequest) -> Job:
        """Check a request whole and queue its choices. Raises ApiError, or EngineFailed."""
        model = self.model(body.model)
        prompts = _chat_prompt(model, body) if isinstance(body, ChatRequest) else _prompts(model, body)
        copies = body.n or 1
        if len(prompts) * copies > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts × n={copies} exceed {MAX_CHOICES} choices a request", "n")
        default = None if isinstance(body, ChatRequest) else 16
        stop_ids = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else model.eos)
        requests = [
            Request(
                prompt,
                body.limit or (default and min(default, max(model.engine.max_model_len - len(prompt), 1))),
                _seed(seed, i),
                stop_ids,
                body.k,
                _sampling(body),
            )
            for prompt in prompts
            for seed in [secrets.randbits(62) if body.seed is None else body.seed]
            for i in range(copies)
        ]
        try:
            tickets = model.loop.submit(requests)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except Overloaded as error:
            raise ApiError(429, f"{error}; try again later", code="overloaded") from None
        start = time.perf_counter()
        choices = [self._choice(model, i, ticket, body.stops, start) for i, ticket in enumerate(tickets)]
        return Job(model, sum(map(len, prompts)), choices, tickets)

    async def _choice(
        self,
        model: ServedModel,
        index: int,
        ticket: Ticket,
        stops: list[str],
        start: float,
    ) -> AsyncGenerator[Event, None]:
        """The events of one choice; leaving it early cancels the request."""
        text = TextStream(model.tokenizer, stops)
        tokens, first, reason = 0, None, "abort"
        try:
            async with aclosing(model.loop.follow(ticket)) as stream:
                async for output, stamp in stream:
                    piece = text.push(output.tokens)
                    tokens += piece.tokens
                    if first is None and piece.tokens:
                        first = time.perf_counter()
                        model.metrics.first_token(first - start)
                    model.metrics.returned(piece.tokens, len(output.tokens) - piece.tokens)
                    if piece.stopped:
                        reason = "stop"
                        yield Event(index, piece.text, tokens, "stop", text.stop, stamp)
                        return
                    if output.finish_reason:
                        reason = output.finish_reason
                        stop = output.stop_id if output.stop_id not in model.eos else None
                        yield Event(index, piece.text + text.flush(), tokens, reason, stop, stamp)
                        return
                    yield Event(index, piece.text, tokens, None, None, stamp)
        finally:
            model.loop.cancel(ticket)
            end = time.perf_counter()
            model.metrics.finished(reason, end - start, end - (first or end), len(ticket.request.prompt), tokens)


async def merged(choices: list[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """The events of all choices as they happen."""
    if len(choices) == 1:
        async with aclosing(choices[0]) as only:
            async for event in only:
                yield event
        return
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

    async def follow(choice: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(choice) as events:
                async for event in events:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(follow(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seed(seed: int, choice: int) -> int:
    """Choice 0 is what the seed gives anywhere; the others have seeds that follow from it."""
    return seed if choice == 0 else derive_key(seed, "choice", choice)


def _sampling(body: CompletionRequest | ChatRequest) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
    )


def _prompts(model: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [_encode(model, prompt) if isinstance(prompt, str) else prompt for prompt in given]


def _encode(model: ServedModel, text: str, **options: Any) -> list[int]:
    most = CHARACTERS * model.engine.max_model_len
    if len(text) > most:  # do not even count its tokens: that would take the time of others
        raise ApiError(
            400,
            f"a prompt of {len(text)} characters exceeds the context of {model.engine.max_model_len} tokens",
            "prompt",
        )
    try:
        ids: list[int] = model.tokenizer(text, **options).input_ids
    except (UnicodeError, TypeError):
        raise ApiError(400, "the prompt is not valid Unicode (a lone surrogate?)", "prompt") from None
    if not ids:
        raise ApiError(400, "the prompt has no tokens", "prompt")
    return ids


def _chat_prompt(model: ServedModel, body: ChatRequest) -> list[list[int]]:
    if not getattr(model.tokenizer, "chat_template", None):
        raise ApiError(400, f"{model.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
    try:
        text = model.tokenizer.apply_chat_template(
            [message.plain() for message in body.messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # templates raise what they like about roles and their order
        raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
    return [_encode(model, text, add_special_tokens=False)]
