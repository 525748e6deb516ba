"""What a train worker needs to know of its stage, and how it follows from the stage's spec."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.config.stages import StageSpec
from pipelines.rollouts.actor import RolloutJob
from pipelines.training.initial_model import AR, Grown, Wrapped


@dataclass(frozen=True)
class TrainJob:
    """All that a train worker needs to know of its stage, as plain values that can be sent to it."""

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
    """The model that the stage begins with."""
    text_k: int | None = None
    """Tokens of the blocks that are the text's own (`targets=text`); None for other training."""


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
    )
    return TrainJob(spec.name, folder, store, spec.seed, spec.train, spec.rollout, rollout_job, init)
