"""The streaming dataset of a stage: rows are read, rolled out by the actor pool and handed to train workers."""

from __future__ import annotations

from typing import Any

from pipelines.config.schema import RolloutConfig
from pipelines.config.section import node_selector
from pipelines.rollouts.plan import ReadChunk, RolloutJob, StepPlan


class Rollouts:
    """A `RolloutActor`, which is imported where it runs: every process that plans or splits the dataset loads this class."""

    def __init__(self, job: RolloutJob):
        from pipelines.rollouts.actor import RolloutActor

        self.actor = RolloutActor(job)

    def __call__(self, rows: Any) -> Any:
        """Rows of tokens → the same rows with their rollouts."""
        return self.actor(rows)


def training_rows(store: str, seed: int, plan: StepPlan, job: RolloutJob | None, rollout: RolloutConfig) -> Any:
    """The streaming dataset of a stage: one block for each chunk, in order. With a job, actors roll the rows out."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    dataset = ray.data.range(plan.chunks, override_num_blocks=plan.chunks).map_batches(
        ReadChunk(store, seed, plan), batch_format="pyarrow", batch_size=1
    )
    return dataset if job is None else _rolled_out(dataset, job, rollout, plan.rows_per_worker * plan.steps_per_chunk)


def _rolled_out(dataset: Any, job: RolloutJob, rollout: RolloutConfig, rows: int) -> Any:
    """The dataset, rolled out by the pool of actors, `rows` rows in each call."""
    import ray.data

    return dataset.map_batches(
        Rollouts,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        # Ray needs a batch size when there are GPUs. Without one, a call gets a block, which is a chunk.
        batch_size=rows if rollout.gpus_per_actor else None,
        num_cpus=rollout.cpus_per_actor,
        num_gpus=rollout.gpus_per_actor or None,
        label_selector=node_selector(rollout.label),
        compute=ray.data.ActorPoolStrategy(size=rollout.actors, max_tasks_in_flight_per_actor=4),
    )
