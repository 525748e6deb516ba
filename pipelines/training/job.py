"""What a train worker needs to know of its stage."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.rollouts.actor import RolloutJob
from pipelines.training.initial_model import AR, Grown, Wrapped


@dataclass(frozen=True)
class TrainJob:
    """All a train worker needs to know; plain values, so that it can travel."""

    stage: str
    folder: str
    store: str
    """Token store, or rollout store when rollouts are cached."""
    seed: int
    train: TrainConfig
    rollout: RolloutConfig
    rollout_job: RolloutJob | None
    """None for AR training and for cached rollouts."""
    init: AR | Grown | Wrapped
    """How the model of the stage begins."""
