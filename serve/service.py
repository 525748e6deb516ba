"""What a replica does for its clients, without HTTP and without Ray: requests go in, new text of their choices comes out."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from kforcing.engine import Request
from serve.choice import ChoiceDelta, ChoiceReader
from serve.engine_requests import Choices, field_of, read_choices, tokens_of
from serve.engine_thread import EngineFailed, EngineThread, Overloaded, PendingRequest
from serve.metrics import Metrics
from serve.models import ServedModel, load_models, loading_settings
from serve.protocol.errors import ApiError
from serve.protocol.requests import ChatRequest, CompletionRequest, TokenizeRequest
from serve.settings import Settings

STUCK_S = 120.0
"""Seconds after which an unfinished step means that the engine is dead."""
PROOF_S = 10.0
"""Seconds for which a forward pass proves that a model is ready."""

POLL_S = 0.05
"""Seconds between two looks at whether models have come or gone."""
DELIVERY_S = 10.0
"""Seconds for which drained models are kept, at most, for clients that have not read the end of their answers."""

logger = logging.getLogger("ray.serve")


@dataclass
class AcceptedRequest:
    """A request whose choices are queued; each choice is an iterator of its deltas."""

    model: ServedModel
    prompt_tokens: int
    choices: list[AsyncGenerator[ChoiceDelta, None]]
    asked: Choices
    pending: list[PendingRequest]

    def close(self) -> None:
        """Cancel the choices that have not ended."""
        for pending in self.pending:
            self.model.async_engine.cancel(pending)
            if not pending.read:
                pending.read = True
                self.model.metrics.finished(
                    "abort", time.perf_counter() - pending.submitted, 0.0, len(pending.request.prompt), 0
                )


class Service:
    """The models of a replica, and what clients can ask of them."""

    def __init__(self, replica: str):
        self.replica = replica
        self.metrics = Metrics()
        self.thread = EngineThread()
        self.settings: Settings | None = None
        self.models: dict[str, ServedModel] = {}
        self.failed_deployment: str | None = None
        """Why the newest settings are not served, if they are not."""
        self._swap = asyncio.Lock()
        self._tokenising = ThreadPoolExecutor(1, "tokenise")

    async def configure(self, settings: Settings, before: Settings | None = None) -> None:
        """Serve the models that the settings name. Requests to the former models run to their end. Safe to repeat.

        The former models answer until the new ones are loaded, or are freed before with `load_after_drain`.
        Where they cannot be loaded, the models that are served already stay, or those of the settings `before` are loaded,
        and `failed_deployment` says why. If there is nothing to fall back to, the error is raised.
        """
        async with self._swap:
            if self.models and self.settings and loading_settings(settings) == loading_settings(self.settings):
                self.settings = settings
                for model in self.models.values():
                    model.async_engine.max_waiting = settings.max_waiting
                self._note_failure(None)
                return
            before = self.settings or before
            if settings.load_after_drain:
                await self._drain()
            failure, models = None, None
            try:
                models = await self._load(settings)
            except Exception as error:
                if before is None:
                    raise
                failure = f"model={settings.model} cannot be served: {type(error).__name__}: {error}"
            if models is None:  # outside of `except`, since the error's traceback holds what was loaded
                gc.collect()
                logger.error("%s; what was served before is served on", failure)
                assert before is not None
                settings = before
                models = self.models or await self._load(settings)
            self._note_failure(failure)
            if models is self.models:
                return
            former, self.models, self.settings = self.models, models, settings
            for model in former.values():
                model.async_engine.close()
            logger.info("serving %s", ", ".join(f"{n} (k={m.engine.k})" for n, m in models.items()))

    async def _drain(self) -> None:
        """Finish the requests of all models and free their memory. Requests that come from now on wait for other models."""
        former, self.models = self.models, {}
        engines = [weakref.ref(model.engine) for model in former.values()]
        await _finish(former)
        del former
        deadline = time.monotonic() + DELIVERY_S
        while any(engine() for engine in engines) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
            gc.collect()
        if any(engine() for engine in engines):
            logger.warning(
                "clients still read answers of the former models, so these stay in memory beside the new ones"
            )

    async def wait_for_models(self) -> None:
        """Return when there are models: while they are replaced after a drain, there are none."""
        while not self.models and self._swap.locked():
            await asyncio.sleep(POLL_S)

    def _note_failure(self, failure: str | None) -> None:
        self.failed_deployment = failure
        self.metrics.failed.labels(self.replica).set(failure is not None)

    async def _load(self, settings: Settings) -> dict[str, ServedModel]:
        # A thread of its own, whose OpenMP team ends with it (`engine_thread.py` says why).
        with ThreadPoolExecutor(1, "load") as once:
            future = once.submit(load_models, settings, self.metrics, self.replica, self.thread)
            return await asyncio.wrap_future(future)

    def check_alive(self) -> None:
        """Raise RuntimeError if an engine has died or hangs."""
        for name, model in self.models.items():
            if not model.async_engine.alive:
                raise RuntimeError(f"the engine of {name} has stopped: {model.async_engine.failure}")
            if (seconds := model.async_engine.stuck_for()) > STUCK_S:
                raise RuntimeError(f"the engine of {name} has not finished a step for {seconds:.0f} s")

    async def check_ready(self) -> None:
        """Raise RuntimeError unless every model has run a forward pass within `PROOF_S`. An idle model runs one now."""
        self.check_alive()
        if not self.models:
            raise RuntimeError("no model is loaded yet")
        for name, model in list(self.models.items()):
            if model.async_engine.pending or time.monotonic() - model.proved < PROOF_S:
                continue
            try:
                await _probe(model)
            except (asyncio.TimeoutError, EngineFailed) as error:
                if self.models.get(name) is model:  # otherwise it was replaced in the meantime
                    raise RuntimeError(f"{name} does not decode: {error}") from None
            except Overloaded:
                pass  # a busy model is alive
            model.proved = time.monotonic()

    def model(self, name: str | None) -> ServedModel:
        """The model with this name, or the first when the name is None. Raises ApiError: 404, or 503 without models."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if not self.models:
            raise ApiError(503, "no model is loaded; try again later", code="not_ready")
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"model {name!r} is not served here; there are: {known}", "model", "model_not_found")
        return self.models[name]

    async def tokenise(self, body: TokenizeRequest) -> tuple[ServedModel, list[int]]:
        """The tokens of a prompt or of a conversation, as a request with it would have them. Raises ApiError."""
        await self.wait_for_models()
        model, given = self.model(body.model), body.prompt or body.messages or []
        add = body.add_special_tokens is not False
        loop = asyncio.get_running_loop()
        return model, await loop.run_in_executor(self._tokenising, tokens_of, model, given, add, body.functions)

    async def accept(self, body: CompletionRequest | ChatRequest, client: str = "") -> AcceptedRequest:
        """Check a whole request and queue its choices. Raises ApiError or EngineFailed.

        Args:
            client: who sends it; free slots are shared fairly between clients, and then between requests.
        """
        while True:
            await self.wait_for_models()
            if (accepted := await self._accept(body, client)) is not None:
                return accepted

    async def _accept(self, body: CompletionRequest | ChatRequest, client: str) -> AcceptedRequest | None:
        """See `accept`; None for a request whose model was replaced while its prompt was tokenised."""
        model = self.model(body.model)
        asked = await read_choices(model, body, self._tokenising)
        try:
            pending = model.async_engine.submit(asked.requests, client)
        except EngineFailed:
            if self.models.get(model.name) is model:
                raise
            return None
        except ValueError as error:
            raise ApiError(400, str(error), field_of(error, body)) from None
        except Overloaded as error:
            raise ApiError(429, f"{error}; try again later", code="overloaded") from None
        choices = [_deltas(model, i, each, asked) for i, each in enumerate(pending)]
        prompt_tokens = sum(len(request.prompt) for request in asked.requests) // (body.n or 1)
        return AcceptedRequest(model, prompt_tokens, choices, asked, pending)


async def _finish(models: dict[str, ServedModel]) -> None:
    """Refuse new requests of these models, and wait until the others have ended."""
    for model in models.values():
        model.async_engine.close()
    while running := [(name, model.async_engine) for name, model in models.items() if not model.async_engine.done]:
        for name, engine in running:
            if not engine.thread.alive or engine.stuck_for() > STUCK_S:  # Serve replaces a replica that cannot change
                raise RuntimeError(f"the engine of {name} hangs while its requests are finished")
        await asyncio.sleep(POLL_S)


async def _probe(model: ServedModel) -> None:
    """Decode one token. Raises asyncio.TimeoutError, EngineFailed or Overloaded."""
    (pending,) = model.async_engine.submit([Request([0], 1, k=1)])
    model.metrics.probed()
    async with aclosing(model.async_engine.outputs(pending)) as outputs:
        await asyncio.wait_for(anext(outputs), STUCK_S)


async def _deltas(
    model: ServedModel, index: int, pending: PendingRequest, asked: Choices
) -> AsyncGenerator[ChoiceDelta, None]:
    """The deltas of one choice. Closing the iterator before its end cancels the choice."""
    pending.read = True
    reader = ChoiceReader(index, asked, model.eos)
    first, reason = None, "abort"
    try:
        async with aclosing(model.async_engine.outputs(pending)) as outputs:
            async for output, stamp in outputs:
                before = reader.tokens
                delta = reader.read(output, stamp)
                made = reader.tokens - before
                if first is None and made:
                    first = time.perf_counter()
                    model.metrics.first_token(first - pending.submitted)
                model.metrics.returned(made, len(output.tokens) - made)
                reason = delta.finish or reason
                yield delta
                if delta.finish:
                    return
    finally:
        model.async_engine.cancel(pending)
        end = time.perf_counter()
        seconds, after_first = end - pending.submitted, end - (first or end)
        model.metrics.finished(reason, seconds, after_first, len(pending.request.prompt), reader.tokens)


async def merged(choices: list[AsyncGenerator[ChoiceDelta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """The deltas of all choices in the order in which they are made."""
    if len(choices) == 1:
        async with aclosing(choices[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[ChoiceDelta | BaseException | None] = asyncio.Queue()

    async def forward(choice: AsyncGenerator[ChoiceDelta, None]) -> None:
        try:
            async with aclosing(choice) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
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
