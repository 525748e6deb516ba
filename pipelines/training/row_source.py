"""The rows of a stage from its newest checkpoint on, as Ray Train asks for them; its controller has no need of torch."""

from __future__ import annotations

from typing import Any

from kforcing.remote import local
from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.rollouts.plan import RolloutJob, StepPlan
from pipelines.rollouts.stream import training_rows
from pipelines.training.checkpoints import latest_checkpoint


def rows_from_checkpoint(
    checkpoints: str, train: TrainConfig, store: str, seed: int, job: RolloutJob | None, rollout: RolloutConfig
) -> Any:
    """The dataset of a stage, whose checkpoints are in a folder or URI.

    Called anew for each group of workers, so that a restart begins at the latest checkpoint.
    """
    latest = latest_checkpoint(local(checkpoints))
    return training_rows(store, seed, StepPlan.of(train, rollout, latest["step"] if latest else 0), job, rollout)
