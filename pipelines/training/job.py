"""What a train worker needs to know of its stage, how it follows from the stage's spec, and what all who train it share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from kforcing.device import pick_device
from kforcing.distillation.steps import TokenBatch, WindowBatch
from kforcing.distillation.text import TextBatch
from kforcing.modeling import PushForwardLM
from kforcing.remote import local
from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.config.stages import StageSpec
from pipelines.data.rows import tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.rollouts.plan import RolloutJob
from pipelines.training.initial_model import AR, Grown, Wrapped
from pipelines.training.step import text_batch, to_batch


@dataclass(frozen=True)
class TrainJob:
    """All that a train worker needs to know of its stage, as plain values that can be sent to it."""

    stage: str
    folder: str
    """Folder of the stage: a path that every node sees, or a URI, of which each node has a copy."""
    store: str
    """Token store, or rollout store when rollouts are cached."""
    seed: int
    train: TrainConfig
    rollout: RolloutConfig
    rollout_job: RolloutJob | None
    """None for AR training and for cached rollouts."""
    init: AR | Grown | Wrapped
    """The model that the stage begins with."""
    text_k: int | None = None
    """Tokens of the blocks that are the text's own (`targets=text`); None for other training."""

    lease: str | None = None
    """Lease by which workers may write to the URI of the stage (see `pipelines.storage.adopt`)."""

    @property
    def place(self) -> Path:
        """Folder of the stage on this node."""
        return local(self.folder)

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints on this node."""
        return self.place / "checkpoints"


def stage_job(spec: StageSpec, folder: str, store: str, teacher: str, previous: str | None) -> TrainJob:
    """The job of a student stage: the model that it begins with, and the rollouts that it is trained on.

    Args:
        folder: where the stage's student goes.
        store: folder of the training tokens.
        teacher: folder of the AR model.
        previous: folder of the student of the stage before; None for the first stage.
    """
    init: Grown | Wrapped
    if previous is None or spec.train.warm_start == "teacher":
        init = Wrapped(teacher, spec.k, spec.design, spec.loss, spec.seed, spec.train.sampled_tokens)
    else:
        init = Grown(previous, spec.k, spec.loss)
    if spec.targets == "text":
        return TrainJob(spec.name, folder, store, spec.seed, spec.train, spec.rollout, None, init, text_k=spec.k)
    ar = previous is None or spec.targets == "ar"
    rollout_job = RolloutJob(
        teacher if ar or previous is None else previous,
        ar,
        spec.k,
        spec.rollout.windows,
        spec.seed,
        spec.name,
        spec.design,
        spec.rollout.teacher_top_k,
        spec.rollout.batch,
        threads=max(1, int(spec.rollout.cpus_per_actor)),
        draws=spec.rollout.draws,
        run=Path(folder).parent.name,
    )
    return TrainJob(spec.name, folder, store, spec.seed, spec.train, spec.rollout, rollout_job, init)


def micro_batches(
    job: TrainJob, rows: pa.Table, size: int, own_key: int, own_fraction: float
) -> list[TokenBatch | WindowBatch | TextBatch]:
    """The rows of a step in micro-batches of so many rows, on the device of this process.

    Args:
        own_key: key that chooses the sequences whose windows the student rolls out itself.
        own_fraction: their share of the sequences; text has none.
    """
    device, parts = pick_device(), [rows.slice(i, size) for i in range(0, len(rows), size)]
    if job.text_k:
        return [text_batch(part, device, job.text_k, job.rollout.windows, job.seed, job.stage) for part in parts]
    return [to_batch(part, device, own_key, own_fraction) for part in parts]


CANDIDATE_ROWS = 32
"""Rows of the token store whose states determine a low-rank head."""


def fit_candidates(job: TrainJob, model: PreTrainedModel) -> None:
    """Set the low-rank head of a student that has one from its states on rows of the store, because nothing trains it."""
    if not isinstance(model, PushForwardLM) or not model.design.sequential.draft_rank:
        return
    rows = TokenStore(job.store, job.seed).read(np.arange(CANDIDATE_ROWS))
    windows = min(job.rollout.windows, tokens_of(rows).shape[1] - model.k)
    batch = text_batch(rows, next(model.parameters()).device, model.k, windows, job.seed, job.stage)
    model.eval().readout.fit_candidates(model.backbone, batch.windows, batch.blocks_BWK)
