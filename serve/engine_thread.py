"""Who runs the engines: one thread for all of a replica, so that neither they nor the handlers wait for each other.

    handlers (event loop)  ── submit, cancel ──►  inbox  ─►  worker thread: a step of each engine that has work, and again
           ▲                                                        │ once a step, in one call
           └────────────── a queue for each request ◄───────────────┘

The thread sleeps when nothing runs. A step that raises ends its loop: every open request of it fails, `alive` is false, and
the replica is replaced.

One thread, and no other that computes: GNU OpenMP keeps a team of threads for each thread that has used it, and once the
teams together outnumber the cores it stops waiting actively at barriers. A second team, even an idle one, cost 20% of the
tokens/s on two cores.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field

from kforcing.engine import Engine, Output, Request
from serve.metrics import EngineMetrics


class Overloaded(Exception):
    """The waiting line is full."""


class EngineFailed(Exception):
    """The engine of this replica is dead; the request may be sent again."""


SWITCH_S = 2e-4
"""How long Python may keep the engine waiting for the interpreter's lock (5 ms by default)."""

Item = tuple[Output, float] | BaseException
"""An output with the time (`time.perf_counter`) at which its step ended, or why there will be none."""


@dataclass
class Ticket:
    """A request in the loop."""

    request: Request
    outputs: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    id: int | None = None
    submitted: float = field(default_factory=time.perf_counter)
    queued: bool = True
    ended: bool = False
    cancelled: bool = False


Delivery = tuple[Ticket, Item]


class Worker:
    """The thread that gives the engines of a replica their turns."""

    def __init__(self) -> None:
        self.wake = threading.Condition()
        self._loops: list[EngineLoop] = []
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self._closing = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def add(self, loop: EngineLoop) -> None:
        """From now on this loop has turns, until it is done."""
        with self.wake:
            self._loops.append(loop)

    def close(self) -> None:
        """End the thread once all loops are done."""
        with self.wake:
            self._closing = True
            self.wake.notify()

    def _run(self) -> None:
        # An operation that gives the interpreter's lock away should get it back at once: handlers are many and patient.
        sys.setswitchinterval(SWITCH_S)
        while self._turns():
            pass

    def _turns(self) -> bool:
        """A turn for each engine that has work, or sleep. Holds on to no engine in between. False to end."""
        with self.wake:
            self._loops = [loop for loop in self._loops if not loop.done]
            if self._closing and not self._loops:
                return False
            busy = [loop for loop in self._loops if loop.has_work]
            if not busy:
                self.wake.wait()
        for loop in busy:
            loop.turn()
        return True


class EngineLoop:
    """Runs an engine for the handlers of one event loop.

    Args:
        max_waiting: requests that may wait beyond those that have a slot.
        worker: the thread that will run it.
    """

    def __init__(self, engine: Engine, metrics: EngineMetrics, max_waiting: int, worker: Worker):
        self.engine, self.metrics, self.max_waiting = engine, metrics, max_waiting
        self.worker = worker
        self.failure: BaseException | None = None
        self.last_step = time.perf_counter()
        self._slept = True
        self._inbox: list[Ticket] = []
        self._open: dict[int, Ticket] = {}
        self._pending = 0
        self._wake = worker.wake
        self._closing = False
        self._asyncio: asyncio.AbstractEventLoop | None = None
        worker.add(self)

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self.worker.alive and self.failure is None

    @property
    def pending(self) -> int:
        """Requests that wait or run."""
        return self._pending

    def stuck_for(self) -> float:
        """Seconds since the last step ended while there is work; 0 when there is none."""
        return time.perf_counter() - self.last_step if self._pending else 0.0

    def submit(self, requests: list[Request]) -> list[Ticket]:
        """Queue requests together, all or none. Called from the event loop that will follow them.

        Raises:
            ValueError: when the model cannot serve one of them, or never so many at once.
            Overloaded: when too many wait already.
            EngineFailed: when the engine is dead.
        """
        for request in requests:
            self.engine.check(request)
        most = self.engine.config.max_num_seqs + self.max_waiting
        if len(requests) > most:
            raise ValueError(f"{len(requests)} choices in one request, where {most} may run and wait; ask for fewer")
        self._asyncio = asyncio.get_running_loop()
        tickets = [Ticket(request) for request in requests]
        with self._wake:
            if self.failure is not None or self._closing:
                raise EngineFailed(f"the engine has stopped: {self.failure or 'it was replaced'}")
            if self._pending + len(requests) > most:
                self.metrics.rejected(len(requests))
                raise Overloaded(f"{self._pending} requests wait or run already")
            if not self._pending:
                self.last_step = time.perf_counter()
                self._slept = True
            self._pending += len(tickets)
            self._inbox += tickets
            self._wake.notify()
        return tickets

    async def follow(self, ticket: Ticket) -> AsyncGenerator[tuple[Output, float], None]:
        """The outputs of a request as they are made, each with the time at which its step ended."""
        while True:
            item = await ticket.outputs.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item[0].finish_reason:
                return

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; nothing happens if it has ended."""
        if not ticket.ended:
            with self._wake:
                ticket.cancelled = True
                self._wake.notify()

    def close(self) -> None:
        """Finish what waits or runs; what comes later is refused."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    @property
    def done(self) -> bool:
        """Whether the worker may forget this loop."""
        return self.failure is not None or (self._closing and not self._pending)

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._inbox) or not self.engine.idle or any(ticket.cancelled for ticket in self._open.values())

    def turn(self) -> None:
        """Take in what the handlers asked for, and one step. Called by the worker alone."""
        try:
            with self._wake:
                self._take_in()
            if self.engine.idle:
                return
            start, before = time.perf_counter(), self.last_step
            outputs = self.engine.step()
            self.last_step = end = time.perf_counter()
            self._note_queue(end)
            self.metrics.after_step(self.engine, end - start, 0.0 if self._slept else max(start - before, 0.0))
            self._hand_out(outputs, end)
            self._slept = False
        except BaseException as error:  # whatever it was, everybody has to hear of it
            self._fail(error)

    def _take_in(self) -> None:
        self._drop_cancelled()
        for ticket in self._inbox:
            ticket.id = self.engine.submit(ticket.request)
            self._open[ticket.id] = ticket
        self._inbox.clear()

    def _drop_cancelled(self) -> None:
        for ticket in [t for t in (*self._inbox, *self._open.values()) if t.cancelled]:
            if ticket.id is None:
                self._inbox.remove(ticket)
            else:
                self.engine.cancel(ticket.id)
                del self._open[ticket.id]
            self._pending -= 1

    def _note_queue(self, now: float) -> None:
        """How long each request waited for the slot that it has now."""
        waiting = {r.id for r in self.engine.waiting}
        for ticket in self._open.values():
            if ticket.queued and ticket.id not in waiting:
                ticket.queued = False
                self.metrics.queued(now - ticket.submitted)

    def _hand_out(self, outputs: list[Output], now: float) -> None:
        deliveries: list[Delivery] = []
        for output in outputs:
            ticket = self._open.get(output.id)
            if ticket is None or ticket.cancelled:  # nobody listens any more
                self.metrics.returned(0, len(output.tokens))
                continue
            deliveries.append((ticket, (output, now)))
            if output.finish_reason:
                ticket.ended = True
                del self._open[output.id]
                with self._wake:
                    self._pending -= 1
        if deliveries:
            self._call(deliveries)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self.failure = error
            tickets = [*self._inbox, *self._open.values()]
            self._inbox.clear()
            self._open.clear()
            self._pending = 0
        self.metrics.stopped()
        failed = EngineFailed(f"the engine has stopped: {type(error).__name__}: {error}")
        self._call([(ticket, failed) for ticket in tickets])

    def _call(self, deliveries: list[Delivery]) -> None:
        """Fill the queues from the event loop that listens to them, in one call."""

        def deliver() -> None:
            for ticket, item in deliveries:
                ticket.outputs.put_nowait(item)

        if self._asyncio is not None:
            with suppress(RuntimeError):  # the event loop has gone, and everybody who listened with it
                self._asyncio.call_soon_threadsafe(deliver)
