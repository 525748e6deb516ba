"""Which rows of the token store belong to which optimiser step and train worker, and what a rollout adds to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kforcing.design import Design
from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.data.token_store import (
    open_store,
)

# Ray plans all chunks in advance, so the chunks of long stages are longer.
MAX_CHUNKS = 20_000


@dataclass(frozen=True)
class StepPlan:
    """Which row positions belong to which step and worker: step s takes positions [s·batch, (s + 1)·batch)."""

    batch: int
    workers: int
    steps: int
    start: int
    steps_per_chunk: int

    @property
    def chunks(self) -> int:
        """Chunks from `start` to the end, `workers` of them for every `steps_per_chunk` steps."""
        return -(-(self.steps - self.start) // self.steps_per_chunk) * self.workers

    @property
    def rows_per_worker(self) -> int:
        """Number of rows that a worker consumes in a step."""
        return self.batch // self.workers

    def positions(self, chunk: int) -> np.ndarray:
        """The row positions of a chunk: those of worker chunk % workers in the steps of group chunk // workers."""
        group, worker = divmod(chunk, self.workers)
        first = self.start + group * self.steps_per_chunk
        steps = np.arange(first, min(first + self.steps_per_chunk, self.steps))
        rows = np.arange(self.rows_per_worker) + worker * self.rows_per_worker
        return (steps[:, None] * self.batch + rows).reshape(-1)

    @classmethod
    def of(cls, train: TrainConfig, rollout: RolloutConfig, start: int) -> StepPlan:
        """The plan of a stage's training from step `start` on."""
        per_chunk = max(rollout.steps_per_chunk, -(-train.steps * train.workers // MAX_CHUNKS))
        return cls(train.batch, train.workers, train.steps, start, per_chunk)


@dataclass(frozen=True)
class ReadChunk:
    """Maps numbers of chunks to rows of a store. Ray Data calls it in its reading tasks."""

    store: str
    seed: int
    plan: StepPlan

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """A column `id` of chunk numbers → their rows."""
        positions = np.concatenate([self.plan.positions(int(c)) for c in chunks["id"].to_numpy()])
        return open_store(self.store, self.seed).read(positions)


@dataclass(frozen=True)
class RolloutJob:
    """All that determines the rows of a rollout, so that every actor makes the same ones."""

    teacher: str
    """Folder or URI of the teacher: a `PushForwardLM`, or a Hugging Face causal LM when `ar`."""
    ar: bool
    k: int
    """Target tokens of a window."""
    windows: int
    seed: int
    stage: str
    """Stage and epoch name the stream of the noise."""
    design: Design
    """Design of the student, which determines the coupling and the temperatures."""
    teacher_top_k: int | None
    """How many of the teacher's likeliest tokens label each target; None for targets without labels."""
    batch: int | None
    """Sequences in one forward pass; None for as many as the device has room for."""
    threads: int
    draws: int = 1
    """Windows of each anchor, with independent noise."""
    run: str = ""
    """Name of the run, for its metrics."""
