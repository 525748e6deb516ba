"""What a replica does for its clients, without HTTP and without Ray: requests go in, new text of their choices comes out."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from kforcing.engine import Request
from serve.choice import ChoiceDelta, ChoiceReader
from serve.engine_requests import Choices, count_choices, field_of, read_choices, tokens_of
from serve.engine_thread import Delivery, EngineFailed, EngineThread, Overloaded, PendingRequest
from serve.metrics import Metrics
from serve.models import ServedModel, default_name, fetch_models, load_models, loading_settings
from serve.protocol.errors import ApiError, overloaded
from serve.protocol.requests import ChatRequest, CompletionRequest, TokenizeRequest
from serve.settings import Settings

STUCK_S = 120.0
"""Seconds after which an unfinished step means that the engine is dead."""
PROOF_S = 10.0
"""Seconds for which a forward pass proves that a model is ready."""

POLL_S = 0.05
"""Seconds between two looks at whether models have come or gone."""
RELEASE_S = 10.0
"""Seconds for which a change waits, at most, for those who still use a drained model, for example to tokenise a prompt."""

T = TypeVar("T")
logger = logging.getLogger("ray.serve")


class EngineHangs(RuntimeError):
    """An engine does not finish its requests, so the replica cannot change its models."""


class AcceptedRequest:
    """A request whose choices are queued. Somebody has to `close` it.

    It does not refer to the engine, so that a client who reads slowly keeps no weights of a replaced model in memory.

    Args:
        pending: one for each choice.
    """

    def __init__(self, model: ServedModel, asked: Choices, pending: list[PendingRequest], prompt_tokens: int):
        self.model, self.metrics = model.name, model.metrics
        self.asked, self.prompt_tokens = asked, prompt_tokens
        self.choices = len(pending)
        self._open = {each: ChoiceReader(i, asked, model.eos) for i, each in enumerate(pending)}
        self._outputs = pending[0].outputs
        self._failure: EngineFailed | None = None

    async def read(self) -> list[ChoiceDelta]:
        """What the steps since the last call have added to the choices, at least one; nothing when all choices have ended.

        Raises EngineFailed.
        """
        while self._open:
            if self._failure:
                raise self._failure
            deliveries = [await self._outputs.get()]
            while not self._outputs.empty():
                deliveries.append(self._outputs.get_nowait())
            if deltas := [delta for each in deliveries if (delta := self._delta(each))]:
                return deltas
        return []

    def _delta(self, delivery: Delivery) -> ChoiceDelta | None:
        """What an output adds to its choice; None for a choice that has ended, and for a failure."""
        pending, output, stamp = delivery
        if isinstance(output, EngineFailed):
            self._failure = output
            return None
        if (reader := self._open.get(pending)) is None:
            self.metrics.returned(0, len(output.tokens))
            return None
        before = reader.tokens
        delta = reader.read(output, stamp)
        made = reader.tokens - before
        if reader.begun is None and made:
            reader.begun = time.perf_counter()
            self.metrics.first_token(reader.begun - pending.submitted)
        self.metrics.returned(made, len(output.tokens) - made)
        if delta.finish:
            self._end(pending, delta.finish)
        return delta

    def _end(self, pending: PendingRequest, reason: str) -> None:
        reader = self._open.pop(pending)
        pending.cancel()
        end = time.perf_counter()
        seconds, after_first = end - pending.submitted, end - (reader.begun or end)
        self.metrics.finished(reason, seconds, after_first, len(pending.request.prompt), reader.tokens)

    def close(self) -> None:
        """Cancel the choices that have not ended."""
        for pending in list(self._open):
            self._end(pending, "abort")


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
        self._folders: dict[str, Path] = {}
        """Where the models were loaded from."""
        self._swap = asyncio.Lock()
        self._coming: Settings | None = None
        """The settings that `configure` was last called with."""
        self._change: Future[None] | None = None
        """Of the change of models that is under way; it is done when the change has ended."""
        self._held = 0
        """Choices of the requests that came while there were no models, and do not have a place in an engine yet."""
        self._turns = asyncio.Lock()
        """It lets these requests in by the order of their arrival, and newer ones behind them."""
        self._tokenising = ThreadPoolExecutor(1, "tokenise")

    async def configure(self, settings: Settings, before: Settings | None = None) -> None:
        """Serve the models that the settings name. Requests to the former models run to their end. Safe to repeat.

        The former models answer until the new ones are loaded. With `load_after_drain` they answer until the new ones have
        been downloaded and checked, and are freed before these are loaded.
        Where they cannot be loaded, the models that are served already stay, or those of the settings `before` are loaded,
        and `failed_deployment` says why. If there is nothing to fall back to, the error is raised.
        """
        async with self._swap:
            change: Future[None] = Future()
            change.set_running_or_notify_cancel()  # a request that is cancelled while it waits does not cancel it
            self._change = change
            try:
                await self._change_models(settings, before)
            finally:
                self._change = None
                change.set_result(None)

    async def _change_models(self, settings: Settings, before: Settings | None) -> None:
        if self.models and self.settings and loading_settings(settings) == loading_settings(self.settings):
            self.settings = settings
            for model in self.models.values():
                model.async_engine.max_waiting = settings.max_waiting
            self._note_failure(None)
            return
        before, self._coming = self.settings or before, settings
        failure, models, folders = None, None, self._folders
        try:
            folders = await _in_thread(fetch_models, settings)
            if settings.load_after_drain:
                await self._drain()
            models = await self._load(settings, folders)
        except EngineHangs:
            raise
        except Exception as error:
            if before is None:
                raise
            failure = f"model={settings.model} cannot be served: {type(error).__name__}: {error}"
        if models is None:  # outside of `except`, since the error's traceback holds what was loaded
            gc.collect()
            logger.error("%s; what was served before is served on", failure)
            assert before is not None
            settings, folders, models = before, self._folders, self.models
            if folders and not models:
                with suppress(OSError):  # they were removed since
                    models = await self._load(settings, folders)
            if not models:
                folders = await _in_thread(fetch_models, settings)
                models = await self._load(settings, folders)
        self._note_failure(failure)
        if models is self.models:
            return
        former, self.models, self.settings, self._folders = self.models, models, settings, folders
        for model in former.values():
            model.async_engine.close()
        logger.info("serving %s", ", ".join(f"{n} (k={m.engine.k})" for n, m in models.items()))

    async def _drain(self) -> None:
        """Finish the requests of all models and free their memory. Requests that come from now on wait for other models."""
        former, self.models = self.models, {}
        engines = [weakref.ref(model.engine) for model in former.values()]
        await _finish(former)
        del former
        deadline = time.monotonic() + RELEASE_S
        while any(engine() for engine in engines) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
            gc.collect()
        if any(engine() for engine in engines):
            logger.warning("the former models are still in use, so they stay in memory beside the new ones")

    async def wait_for_models(self) -> None:
        """Return when there are models: while they are replaced after a drain, there are none."""
        while not self.models and (change := self._change):
            await asyncio.wrap_future(change)

    @asynccontextmanager
    async def _turn(self, choices: int) -> AsyncIterator[None]:
        """Wait for models. Until all requests that waited have their places, each comes by the order of its arrival.

        Raises ApiError with status 429 if more choices would wait than the coming model runs and queues.
        """
        if self.models and not self._held:
            yield
            return
        coming = self._coming
        held = choices if coming and self._change and not self.models else 0
        if coming and held and self._held + held > coming.max_num_seqs + coming.max_waiting:
            name = coming.name or default_name(coming.model)
            self.metrics.rejected.labels(model=name, replica=self.replica).inc(choices)
            raise overloaded(f"the waiting queue is full: {self._held} choices wait for another model already")
        self._held += held
        try:
            async with self._turns:
                await self.wait_for_models()
                yield
        finally:
            self._held -= held

    def _note_failure(self, failure: str | None) -> None:
        self.failed_deployment = failure
        self.metrics.failed.labels(self.replica).set(failure is not None)

    async def _load(self, settings: Settings, folders: dict[str, Path]) -> dict[str, ServedModel]:
        return await _in_thread(load_models, settings, folders, self.metrics, self.replica, self.thread)

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
            async with self._turn(count_choices(body)):
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
            raise overloaded(str(error)) from None
        prompt_tokens = sum(len(request.prompt) for request in asked.requests) // (body.n or 1)
        return AcceptedRequest(model, asked, pending, prompt_tokens)


async def _in_thread(work: Callable[..., T], *given: Any) -> T:
    """The result of work that may compute, in a thread of its own.

    Its OpenMP team ends with it (`engine_thread.py` says why).
    """
    with ThreadPoolExecutor(1, "load") as once:
        return await asyncio.wrap_future(once.submit(work, *given))


async def _finish(models: dict[str, ServedModel]) -> None:
    """Refuse new requests of these models, and wait until the others have ended."""
    for model in models.values():
        model.async_engine.close()
    while running := [(name, model.async_engine) for name, model in models.items() if not model.async_engine.done]:
        for name, engine in running:
            if not engine.thread.alive or engine.stuck_for() > STUCK_S:  # Serve replaces a replica that cannot change
                raise EngineHangs(f"the engine of {name} hangs while its requests are finished")
        await asyncio.sleep(POLL_S)


async def _probe(model: ServedModel) -> None:
    """Decode one token. Raises asyncio.TimeoutError, EngineFailed or Overloaded."""
    (pending,) = model.async_engine.submit([Request([0], 1, k=1)])
    model.metrics.probed()
    try:
        delivery = await asyncio.wait_for(pending.outputs.get(), STUCK_S)
    finally:
        pending.cancel()
    if isinstance(delivery.output, EngineFailed):
        raise delivery.output
