"""Training of one stage: Ray Train workers, each a DeepSpeed rank, fed by the stage's streaming dataset.

    driver ── TorchTrainer ──► worker 0 … worker n−1      (DeepSpeed ZeRO, one optimiser step in lockstep)
                                   ▲ its shard of `training_rows`, a few chunks ahead
    driver ◄── Relay actor ◄── worker 0                   (metrics; never waited for)

Checkpoints go to `<stage>/checkpoints`; `latest.json` there is what both the dataset (which rows come next) and the
workers (which step comes next) start from, so a restarted worker group continues at the exact row.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from kforcing.chunking import checkpoint_layers
from kforcing.device import pick_device
from kforcing.noise import derive_key
from pipelines.config.schema import TrainConfig
from pipelines.config.section import node_selector
from pipelines.data.rows import positions_of
from pipelines.rollouts.plan import StepPlan
from pipelines.rollouts.stream import training_rows
from pipelines.runs.stages import StageError
from pipelines.training import deepspeed_engine as strategy
from pipelines.training.job import TrainJob
from pipelines.training.progress import Progress
from pipelines.training.step import learning_rate, optimizer_step, to_batch


def fit(job: TrainJob, relay: Any) -> None:
    """Train a stage to its end and leave its model in the stage's folder. Resumes by itself."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    def rows() -> Any:
        latest = strategy.latest_checkpoint(Path(job.folder, "checkpoints"))
        plan = StepPlan.of(job.train, job.rollout, latest["step"] if latest else 0)
        return training_rows(job.store, job.seed, plan, job.rollout_job, job.rollout)

    if _finished(job):
        return
    resources = {"CPU": job.train.cpus_per_worker}
    if job.train.gpus_per_worker:
        resources["GPU"] = job.train.gpus_per_worker
    # Ray Train resumes by run name from its own checkpoints; ours are in the stage's folder, so its record starts anew.
    record = Path(job.folder, "ray_train")
    shutil.rmtree(record, ignore_errors=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "relay": relay},
        scaling_config=ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=job.train.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=node_selector(job.train.label),
        ),
        run_config=RunConfig(
            name=job.stage,
            storage_path=str(record),
            failure_config=FailureConfig(max_failures=job.train.max_failures, controller_failure_limit=3),
        ),
        datasets={"train": rows},
        # Equal blocks, in order, without a preference for local ones: worker r gets every workers-th chunk.
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise StageError(
            f"stage {job.stage} failed {job.train.max_failures + 1} times; the last error was\n{error}\n"
            "Its last checkpoint is kept: once the cause is mended, the same command continues from it"
        ) from error


def _finished(job: TrainJob) -> bool:
    return Path(job.folder, "config.json").is_file()


def train_worker(config: dict[str, Any]) -> None:
    """The loop of one rank."""
    import ray.train

    job: TrainJob = config["job"]
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    module = job.init.build(
        job.train.loss_chunk
    ).eval()  # eval: no dropout, as in the paper, and a resumed step repeats exactly
    if job.train.activation_checkpointing:
        checkpoint_layers(module)
    checkpoints = Path(job.folder, "checkpoints")
    engine = strategy.build_engine(module, job.train, checkpoints)
    average = strategy.MovingAverage(engine, job.train.ema) if job.train.ema else None
    start = strategy.load_checkpoint(engine, average, checkpoints)
    progress = Progress(job, start, config["relay"] if rank == 0 else None)
    shard = ray.train.get_dataset_shard("train")
    batches = shard.iter_batches(batch_size=job.train.batch // world, batch_format="pyarrow", prefetch_batches=2)
    for step, rows in progress.waits(zip(range(start, job.train.steps), batches, strict=False)):
        check_order(rows, step, job.train.batch)
        train = job.train
        strategy.set_lr(engine, learning_rate(step, train.steps, train.lr, train.warmup, train.schedule))
        own = derive_key(job.seed, job.stage, "own"), on_policy_share(step, train)
        micro = [
            to_batch(rows.slice(i, train.micro_batch), pick_device(), *own)
            for i in range(0, len(rows), train.micro_batch)
        ]
        sums = optimizer_step(engine, micro)
        if average:
            average.update(step)
        progress.stepped(step, rows, sums)
        if (step + 1) % train.checkpoint_every == 0 and step + 1 < train.steps:
            strategy.save_checkpoint(engine, average, checkpoints, step + 1)
    if progress.step != job.train.steps:
        raise RuntimeError(f"the data of stage {job.stage} ended at step {progress.step} of {job.train.steps}")
    weights = strategy.whole_weights(engine, average)
    if rank == 0:
        export(job, weights)


def on_policy_share(step: int, train: TrainConfig) -> float:
    """Share of a step's sequences whose windows the student itself rolls out."""
    return train.on_policy_fraction if step >= train.on_policy_from * train.steps else 0.0


def check_order(rows: pa.Table, step: int, batch: int) -> None:
    """Raise RuntimeError unless a step's rows are the ones its number says: what makes resuming exact."""
    positions = positions_of(rows)
    if positions.min() < step * batch or positions.max() >= (step + 1) * batch:
        raise RuntimeError(
            f"step {step} received row positions {positions.min()} to {positions.max()}, expected "
            f"[{step * batch}, {(step + 1) * batch}): Ray Data handed out blocks in another order than planned"
        )


def begin(job: TrainJob) -> None:
    """Leave the model a stage begins with in its folder: all of a stage that has nothing to learn."""
    model: Any = job.init.build().model
    write_model(job, model)


def export(job: TrainJob, weights: dict[str, torch.Tensor]) -> None:
    """Write the stage's model with its trained weights; frozen ones are those the stage began with, to the bit."""
    model: Any = job.init.build().model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {f"model.{name}" for name in parameters} == set(weights), "engine and model disagree on parameter names"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[f"model.{name}"])
    write_model(job, model)


def write_model(job: TrainJob, model: Any) -> None:
    """Save a model to the stage's folder: weights first, `config.json` last, so that a folder with one is complete."""
    partial = Path(job.folder, ".export")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
        file.rename(Path(job.folder, file.name))
    partial.rmdir()
