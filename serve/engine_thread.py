"""The thread that runs the engines of a replica, and the asynchronous interface through which handlers use one engine.

    handlers (event loop)  ── submit, cancel ──►  inbox  ─►  engine thread: one step of each engine that has work, and again
           ▲                                                        │ one call for each step
           └──────── one queue for each HTTP request ◄──────────────┘

The thread sleeps when no request runs. If a step raises an exception, all open requests of that engine fail, `alive` becomes
false, and Ray Serve replaces the replica.

All engines share one thread, and no other thread computes. GNU OpenMP keeps a team of threads for each thread that has used
it, and stops spinning at barriers once all teams together have more threads than the machine has cores. A second team, even
an idle one, cost 20% of the tokens/s on two cores.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kforcing.engine import Engine, Output, Request
from serve.metrics import EngineMetrics


class Overloaded(Exception):
    """The waiting queue is full."""


class EngineFailed(Exception):
    """The engine of this replica is dead. The client may send the request again."""


THREAD_NAME = "engines"
"""Of the engine thread and those that compute for it, also for the operating system."""
SWITCH_S = 2e-4
"""Seconds for which another Python thread may hold the interpreter's lock while the engine waits for it (default: 5 ms)."""
SUCCESSORS_S = 0.02
"""The most seconds for which a step waits for new requests."""
STEPS = 9
"""Steps whose median is the time of a step, so that one that was held up (a capture, a compilation) does not count."""


class Delivery(NamedTuple):
    """What a step made for a request, or why no more will follow."""

    pending: PendingRequest
    output: Output | EngineFailed
    stamp: float
    """`time.perf_counter` at the end of the step."""


@dataclass(eq=False)
class PendingRequest:
    """A request that waits or runs. It does not refer to the engine, which may be freed before its outputs have been read."""

    request: Request
    outputs: asyncio.Queue[Delivery]
    """Of all choices of one HTTP request."""
    wake: threading.Condition
    """Of the engine thread."""
    client: str = ""
    id: int | None = None
    """The engine's id of the request; None until the engine thread has submitted it."""
    submitted: float = field(default_factory=time.perf_counter)
    queued: bool = True
    """Whether it still waits for a slot."""
    ended: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        """Cancel the request; nothing happens if it has ended.

        This only marks the request and wakes the engine thread. Before its next step the thread calls `Engine.cancel`
        (`_drop_cancelled`), and the step's `Scheduler.drop_cancelled` frees the slot. Handlers come here when a client
        disconnects, when a stop string was found, and after every normal end.
        """
        if not self.ended:
            with self.wake:
                self.cancelled = True
                self.wake.notify()


class EngineThread:
    """The thread that runs steps of all engines of a replica in turn."""

    def __init__(self) -> None:
        self.wake = threading.Condition()
        self._engines: list[AsyncEngine] = []
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._closing = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def add(self, engine: AsyncEngine) -> None:
        """Run this engine from now on, until it is done."""
        with self.wake:
            self._engines.append(engine)

    def close(self) -> None:
        """End the thread once all engines are done."""
        with self.wake:
            self._closing = True
            self.wake.notify()

    def _run(self) -> None:
        # There are many handlers and they can wait, so the engine gets the interpreter's lock back as soon as possible.
        sys.setswitchinterval(SWITCH_S)
        with suppress(OSError):  # Linux; the threads that it starts for computing inherit the name
            Path("/proc/thread-self/comm").write_text(THREAD_NAME)
        while self._run_once():
            pass

    def _run_once(self) -> bool:
        """One step of each engine that has work, or sleep until there is work. Returns False when the thread shall end.

        No local variable refers to an engine between two calls, so that a replaced engine is freed.
        """
        with self.wake:
            self._engines = [engine for engine in self._engines if not engine.done]
            if self._closing and not self._engines:
                return False
            busy = [engine for engine in self._engines if engine.has_work]
            if not busy:
                self.wake.wait()
            elif len(busy) == 1 and (seconds := busy[0].seconds_for_successors()) > 0:
                self.wake.wait(seconds)
                busy = []
        for engine in busy:
            engine.step()
        return True


class AsyncEngine:
    """An engine as the handlers of one event loop use it. Its steps run in `thread`.

    Args:
        max_waiting: requests that may wait in addition to the `max_num_seqs` that run.
    """

    def __init__(self, engine: Engine, metrics: EngineMetrics, max_waiting: int, thread: EngineThread):
        self.engine, self.metrics, self.max_waiting = engine, metrics, max_waiting
        self.thread = thread
        self.failure: BaseException | None = None
        self.last_step = time.perf_counter()
        self._slept = True
        self._step_times: deque[float] = deque(maxlen=STEPS)
        self._ended = 0
        """HTTP requests that the last step has ended: each client has at most one successor for each of them."""
        self._wait_until = 0.0
        self._inbox: list[PendingRequest] = []
        self._open: dict[int, PendingRequest] = {}
        self._pending = 0
        self._wake = thread.wake
        self._closing = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        thread.add(self)

    @property
    def alive(self) -> bool:
        """Whether the engine can still make progress."""
        return self.thread.alive and self.failure is None

    @property
    def pending(self) -> int:
        """Number of requests that wait or run."""
        return self._pending

    def stuck_for(self) -> float:
        """Seconds since the last step ended if there is work; 0 if there is none."""
        return time.perf_counter() - self.last_step if self._pending else 0.0

    def submit(self, requests: list[Request], client: str = "") -> list[PendingRequest]:
        """Queue all of the requests or none; their outputs come in one queue, which the event loop that calls this reads.

        Args:
            requests: the choices of one HTTP request.
            client: who sent it.
        Raises:
            ValueError: when the model cannot serve one of them, or never so many at once.
            Overloaded: when the waiting queue has no room for them.
            EngineFailed: when the engine is dead.
        """
        for request in requests:
            self.engine.check(request)
        most = self.engine.config.max_num_seqs + self.max_waiting
        if len(requests) > most:
            raise ValueError(
                f"n × prompts = {len(requests)} choices are asked for, and at most {most} can run and wait; ask for fewer"
            )
        self._event_loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Delivery] = asyncio.Queue()
        pending = [PendingRequest(request, outputs, self._wake, client) for request in requests]
        with self._wake:
            if self.failure is not None or self._closing:
                raise EngineFailed(f"the engine has stopped: {self.failure or 'it was replaced'}")
            if self._pending + len(requests) > most:
                self.metrics.rejected(len(requests))
                raise Overloaded(f"the waiting queue is full: {self._pending} requests wait or run already")
            if not self._pending:
                self.last_step = time.perf_counter()
                self._slept = True
            self._pending += len(pending)
            self._inbox += pending
            self._wake.notify()
        return pending

    def close(self) -> None:
        """Finish the requests that wait or run, and refuse new ones."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    @property
    def done(self) -> bool:
        """Whether the thread may forget this engine."""
        return self.failure is not None or (self._closing and not self._pending)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inbox) or not self.engine.idle or any(pending.cancelled for pending in self._open.values())

    def seconds_for_successors(self) -> float:
        """Seconds for which the next step may still wait for as many new requests as the step before has ended.

        Clients who wait for an answer before they send the next request need some milliseconds for that. A step that begins
        without them leaves their slots empty, so it may come later by half of the share of these slots of a step's time, and
        by `SUCCESSORS_S` at most. Where nothing runs, a new request begins at once.
        """
        if self._closing or self.engine.idle or len(self._inbox) >= self._ended:
            return 0.0
        return self._wait_until - time.perf_counter()

    def step(self) -> None:
        """Apply what the handlers asked for, then run one step of the engine. Only the engine thread calls this."""
        try:
            with self._wake:
                self._drop_cancelled()
                self._admit()
            if self.engine.idle:
                return
            start, before = time.perf_counter(), self.last_step
            outputs = self.engine.step()
            self.last_step = end = time.perf_counter()
            self._step_times.append(end - start)
            self._record_queue_times(end)
            between = 0.0 if self._slept else max(start - before, 0.0)
            self.metrics.after_step(self.engine, end - start, between, len(self._inbox))
            self._deliver_outputs(outputs, end)
            self._slept = False
        except BaseException as error:  # every open request must learn of it, whatever it was
            self._fail(error)

    def _admit(self) -> None:
        """Give each free slot to the client who has the fewest, and among its requests to the one with the fewest choices.

        A request with many choices then delays another one by the time of one choice, not of all. Equals come in the order
        of their arrival.
        """
        clients = Counter(pending.client for pending in self._open.values())
        groups = Counter(pending.outputs for pending in self._open.values())
        while self._inbox and len(self._open) < self.engine.config.max_num_seqs:
            pending = min(self._inbox, key=lambda p: (clients[p.client], groups[p.outputs]))
            self._inbox.remove(pending)
            clients[pending.client] += 1
            groups[pending.outputs] += 1
            pending.id = self.engine.submit(pending.request)
            self._open[pending.id] = pending

    def _drop_cancelled(self) -> None:
        for pending in [p for p in (*self._inbox, *self._open.values()) if p.cancelled]:
            if pending.id is None:
                self._inbox.remove(pending)
            else:
                self.engine.cancel(pending.id)
                del self._open[pending.id]
            self._pending -= 1

    def _record_queue_times(self, now: float) -> None:
        """Record how long each request that now has a slot waited for it."""
        waiting = {r.id for r in self.engine.scheduler.waiting}
        for pending in self._open.values():
            if pending.queued and pending.id not in waiting:
                pending.queued = False
                self.metrics.queued(now - pending.submitted)

    def _deliver_outputs(self, outputs: list[Output], now: float) -> None:
        deliveries: list[Delivery] = []
        ended = set()
        for output in outputs:
            pending = self._open.get(output.id)
            if pending is None or pending.cancelled:  # its client has gone
                self.metrics.returned(0, len(output.tokens))
                continue
            deliveries.append(Delivery(pending, output, now))
            if output.finish_reason:
                pending.ended = True
                ended.add(pending.outputs)
                del self._open[output.id]
                with self._wake:
                    self._pending -= 1
        with self._wake:
            self._ended = len(ended.difference(p.outputs for p in (*self._inbox, *self._open.values())))
        share = self._ended / self.engine.config.max_num_seqs
        self._wait_until = now + min(statistics.median(self._step_times) * share / 2, SUCCESSORS_S)
        if deliveries:
            self._fill_queues(deliveries)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self.failure = error
            open_requests = [*self._inbox, *self._open.values()]
            self._inbox.clear()
            self._open.clear()
            self._pending = 0
        self.metrics.stopped()
        failed = EngineFailed(f"the engine has stopped: {type(error).__name__}: {error}")
        self._fill_queues([Delivery(pending, failed, time.perf_counter()) for pending in open_requests])

    def _fill_queues(self, deliveries: list[Delivery]) -> None:
        """Fill the requests' queues in the event loop that reads them, in one call."""

        def deliver() -> None:
            for delivery in deliveries:
                delivery.pending.outputs.put_nowait(delivery)

        if self._event_loop is not None:
            with suppress(RuntimeError):  # the event loop was closed, and its handlers with it
                self._event_loop.call_soon_threadsafe(deliver)
