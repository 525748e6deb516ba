"""Metrics of a train worker on their way to the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from kforcing.device import peak_gpu_mb, peak_rss_mb
from pipelines.data.rows import rollout_cost
from pipelines.training.job import TrainJob
from pipelines.training.step import largest, reduce_sums

BEAT_S = 1.0
"""Seconds between two notes to the driver that steps are being made."""


class Progress:
    """Counts the steps, tokens and waiting of a rank, and reports them.

    Args:
        job: the stage.
        start: the first step.
        relay: handle of the `Relay` actor that takes the reports; None on ranks that report nothing.
    """

    def __init__(self, job: TrainJob, start: int, relay: Any | None):
        self.job, self.relay, self.step = job, relay, start
        self.first, self.began, self.saved_at = start, time.monotonic(), time.time()
        self.wait = 0.0
        self.mark, self.tokens = self.began, 0
        self.beat_at = 0.0

    def waits(self, batches: Iterator[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
        """The same batches; the time that is spent waiting for each of them is counted."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if self.step == self.first:  # the pipeline is still starting, which does not count as waiting
                self.began = self.mark = time.monotonic()
            else:
                self.wait += time.monotonic() - asked
            yield batch

    def saved(self) -> None:
        """Note that a checkpoint has been written now."""
        self.saved_at = time.time()

    def stepped(self, step: int, rows: pa.Table, sums: Any) -> None:
        """Count a finished step. Every `log_every` steps, reduce the figures over the ranks and report them."""
        self.step = step + 1
        self.tokens += sums.tokens * self.job.train.workers
        if self.relay is not None and time.monotonic() > self.beat_at + BEAT_S:
            self.beat_at = time.monotonic()
            self.relay.beat.remote()
        if self.step % self.job.train.log_every and self.step != self.job.train.steps:
            return
        # Ranks receive their chunks one after the other. A rank that has its rows waits inside the step for the others.
        means, wait = reduce_sums(sums), largest(self.wait, sums.loss.device)
        now = time.monotonic()
        if self.relay is None:
            self.wait, self.mark, self.tokens = 0.0, now, 0
            return
        record = {
            "stage": self.job.stage,
            "step": self.step,
            "steps": self.job.train.steps,
            **means,
            "seconds": now - self.mark,
            "tokens_per_s": self.tokens / (now - self.mark),
            "tokens_seen": self.step * means["tokens"],
            "rows_seen": self.step * self.job.train.batch,
            "saved_at": self.saved_at,
            "data_wait": wait / (now - self.mark),
            "eta_s": (now - self.began) / (self.step - self.first) * (self.job.train.steps - self.step),
            "train_rss_mb": peak_rss_mb(),
            "train_gpu_mb": peak_gpu_mb(),
        }
        if self.job.rollout_job is not None:
            record["actors"] = self.job.rollout.actors
        record |= rollout_cost(rows)
        self.relay.put.remote(record)
        self.wait, self.mark, self.tokens = 0.0, now, 0
