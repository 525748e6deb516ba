"""A stage that makes no progress says why it may wait, and ends in an error that names the stacks of its workers.

train worker   `WorkerWatch` ──► faulthandler writes the stacks of all threads to a file when no step follows in time
               `Progress` ─────► Relay actor: counts that the workers have begun, and that steps are made
driver         `ending_stalls` ► asks the Relay actor for that count; warns, then interrupts the training
"""

from __future__ import annotations

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipelines.failures import Exit, Failure
from pipelines.log import log
from pipelines.runs.stages import StageError
from pipelines.training.job import TrainJob

STACKS = "stacks"
"""Folder in that of a stage with the stacks of the driver and of each rank at a stall; of a URI, on the node of each."""
WARN_AFTER_S = 600.0
"""Seconds without a step after which a warning says so, and again whenever the time has doubled."""
GRACE_S = 5.0
"""Seconds that workers have to write their stacks before the driver ends the stage."""
INTERRUPT_S = 30.0
"""Seconds that Ray Train has to end after an interruption before the next one."""


class WorkerWatch:
    """Writes the stacks of this process to a file when `step` is not called within the limit."""

    def __init__(self, job: TrainJob, rank: int):
        self.limit = job.train.stall_limit_s
        if self.limit:
            folder = job.place / STACKS
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / f"rank-{rank}.txt", "w")  # noqa: SIM115  (faulthandler writes to it later)
            self.step()

    def step(self) -> None:
        """Begin the time anew."""
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, file=self.file)

    def close(self) -> None:
        """Write nothing any more."""
        if self.limit:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()


@contextmanager
def ending_stalls(job: TrainJob, relay: Any) -> Iterator[None]:
    """Watch the training that runs inside: once workers have begun, a stall beyond `train.stall_limit_s` interrupts it.

    Raises StageError instead of that interruption. Must be used in the main thread, which is the one that is interrupted.
    """
    done, fired = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(job, relay, done, fired), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        by_itself = isinstance(error, Failure) and error.exit_code not in (Exit.FAILED, Exit.CLUSTER)
        if not fired.is_set() or by_itself:
            raise
        raise StageError(
            f"stage {job.stage}: no step was made for {job.train.stall_limit_s:g} s (train.stall_limit_s); the stacks of its "
            f"processes are in {job.place / STACKS}. Its last checkpoint is kept: run the same command again, with a "
            "larger limit if its steps, its first rows or its model take that long",
            Exit.STALLED,
        ) from None
    finally:
        done.set()
        watch.join(timeout=GRACE_S)


def _watch(job: TrainJob, relay: Any, done: threading.Event, fired: threading.Event) -> None:
    limit, last, signs = job.train.stall_limit_s, _steps(relay), 0
    since = stalled = time.monotonic()  # the newest sign of progress; the moment from which a stall counts
    warn_at = WARN_AFTER_S
    while not done.wait(min(5.0, (limit or WARN_AFTER_S) / 4)):
        steps, now = _steps(relay), time.monotonic()
        if steps is not None and last is not None and steps > last:
            signs, since, stalled, warn_at = signs + 1, now, now, WARN_AFTER_S
        last = last if steps is None else steps  # a mailbox that was restarted counts from 0
        if now - since > warn_at:
            warn_at *= 2
            log.warning(f"{job.stage}  no step for {(now - since) / 60:.0f} min: {why(job, begun=signs > 1)}")
        if limit and signs and now - stalled > limit + GRACE_S:
            if missing(job):  # it waits for nodes, which may take hours
                stalled = now
                continue
            fired.set()
            _interrupt(job, done)
            return


def _interrupt(job: TrainJob, done: threading.Event) -> None:
    """Keep the driver's stacks and interrupt it. Ray Train ends at the third interruption, whatever its controller does."""
    with suppress(OSError), open(job.place / STACKS / "driver.txt", "w") as file:
        faulthandler.dump_traceback(file)
    for _ in range(3):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if done.wait(INTERRUPT_S):
            return


def _steps(relay: Any) -> int | None:
    """The count of signs of progress: 1 when workers have begun; None while the Relay actor does not answer."""
    import ray

    try:
        return int(ray.get(relay.count.remote(), timeout=5))
    except Exception:
        return None


def why(job: TrainJob, begun: bool) -> str:
    """What a stage without progress probably waits for.

    Args:
        begun: whether it has made a step since its start.
    """
    if wanted := missing(job):
        return wanted
    if not begun:
        return (
            "its workers start, load the model or wait for their first rows; `ray status` shows what Ray cannot place"
        )
    return "a worker or a rollout actor is slow or stuck; `ray stack` on its node shows where"


def missing(job: TrainJob) -> str | None:
    """What a stage needs and the cluster does not have now; None where it has all, or does not answer."""
    import ray

    train, rollout = job.train, job.rollout
    actors = rollout.actors if job.rollout_job else 0
    need = {
        "CPU": train.workers * train.cpus_per_worker + actors * rollout.cpus_per_actor,
        "GPU": train.workers * train.gpus_per_worker + actors * rollout.gpus_per_actor,
    }
    try:
        have = ray.cluster_resources()
    except Exception:
        return None
    for kind, amount in need.items():
        if amount > have.get(kind, 0.0) + 1e-9:
            return f"it needs {amount:g} {kind}s and the cluster has {have.get(kind, 0.0):g} now; it waits for nodes to join"
    return None
