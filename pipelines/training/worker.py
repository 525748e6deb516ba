"""Training of one stage: Ray Train workers, each a DeepSpeed rank, fed by the stage's streaming dataset.

    driver ── TorchTrainer ──► worker 0 … worker n−1      (DeepSpeed ZeRO; all workers make the same step together)
                                   ▲ its shard of `training_rows`, a few chunks ahead
    driver ◄── Relay actor ◄── worker 0                   (metrics; no worker waits for the driver)

Checkpoints go to `<stage>/checkpoints`. The dataset and the workers both start from `latest.json` there: it determines which
rows and which step come next, so a restarted group of workers continues at the exact row.
"""

from __future__ import annotations

import functools
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from kforcing.chunking import checkpoint_layers
from kforcing.keys import derive_key
from kforcing.loading import save_checked
from kforcing.remote import address, fetch, open_uri, uri_of
from pipelines.config.section import node_selector
from pipelines.data.rows import positions_of
from pipelines.failures import Exit, cause_of
from pipelines.files import added_files, atomic_write
from pipelines.runs.stages import StageError
from pipelines.storage import adopt, remove, remove_file
from pipelines.tracking.metrics import count
from pipelines.training import deepspeed_engine as strategy
from pipelines.training.checkpoints import latest_checkpoint, set_changed_aside
from pipelines.training.guard import Diverged, StepFigures, explain
from pipelines.training.job import TrainJob, fit_candidates, micro_batches
from pipelines.training.progress import Progress
from pipelines.training.row_source import rows_from_checkpoint
from pipelines.training.schedule import on_policy_fraction, set_learning_rates
from pipelines.training.step import optimizer_step
from pipelines.training.watchdog import STACKS, WorkerWatch, ending_stalls

DIVERGED = "diverged.txt"
"""File in the folder of a stage that says why its training stopped."""
FAILED = "failed.txt"
"""File in the folder of a stage with the errors and stacks of the workers that failed last."""


def fit(job: TrainJob, relay: Any) -> None:
    """Train a stage to its end, and leave its model in the folder of the stage.

    A stage that was interrupted continues from its last checkpoint; a stage whose model is there is left alone.

    Raises StageError when training has diverged, makes no step for `train.stall_limit_s`, fails more often than
    `train.max_failures` allows, or was begun by a number of workers that cannot be changed.
    """
    if (job.place / "config.json").is_file():
        return
    set_changed_aside(job.checkpoints)
    strategy.check_workers(job.checkpoints, job.train)
    strategy.refuse_code(job.checkpoints)
    diverged = job.place / DIVERGED
    remove_file(diverged)
    shutil.rmtree(job.place / STACKS, ignore_errors=True)
    (job.place / STACKS).mkdir()
    with ending_stalls(job, relay):
        _fit(job, relay)
    fetch(job.folder, whole=False)  # rank 0 may be on another node
    if diverged.is_file():
        count("kforcing_diverged_total", 1, Path(job.folder).parent.name, job.stage)
        raise StageError(f"stage {job.stage}: {diverged.read_text()}", Exit.DIVERGED)


def _fit(job: TrainJob, relay: Any) -> None:
    """Run Ray Train, which restarts workers. Raises StageError when it gives up, or when its controller has died."""
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    # Ray Train would resume by the run's name from checkpoints of its own. Ours are in the stage's folder.
    record = job.place / "ray_train"
    on_interrupt = signal.getsignal(signal.SIGINT)
    remove(record)
    kept = "Its last checkpoint is kept. Remove the cause and run the same command again: it continues from there"
    try:
        _trainer(job, relay, record).fit()
    except TrainingFailedError as error:
        cause, report = cause_of(error), job.place / FAILED
        with suppress(OSError):  # the disk may be what has failed
            atomic_write(report, str(error))
        text = f"stage {job.stage} failed {job.train.max_failures + 1} times; the last error was {cause.text}. {kept}"
        raise StageError(f"{text}; {report} has the stacks", cause.exit_code) from error
    except RayActorError as error:
        raise StageError(f"stage {job.stage}: the controller of Ray Train died. {kept}", Exit.CLUSTER) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves a handler that ignores two Ctrl-C


def _trainer(job: TrainJob, relay: Any, record: Path) -> Any:
    """The Ray trainer of a stage; `record` is the folder for Ray Train's own state."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    train, resources = job.train, {"CPU": job.train.cpus_per_worker}
    source = (job.store, job.seed, job.rollout_job, job.rollout)
    rows = functools.partial(rows_from_checkpoint, f"{job.folder}/checkpoints", train, *source)
    if train.gpus_per_worker:
        resources["GPU"] = train.gpus_per_worker
    return TorchTrainer(
        # As one function: Ray Train would show a config to its controller, which then would have to import torch.
        functools.partial(train_worker, job, relay),
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=node_selector(train.label),
        ),
        run_config=RunConfig(
            name=job.stage,
            **_storage(record),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=3),
        ),
        datasets={"train": rows},
        # In order and without a preference for local blocks, worker r gets chunks r, r + workers, r + 2 · workers, …
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def _storage(record: Path) -> dict[str, Any]:
    """Where Ray Train keeps its state, as arguments of `RunConfig`: all nodes must see the place."""
    if uri := uri_of(record):
        system, path = open_uri(uri)
        return {"storage_path": path, "storage_filesystem": system}
    return {"storage_path": str(record)}


def train_worker(job: TrainJob, relay: Any) -> None:
    """Train one rank to the end of the stage; rank 0 writes the model, or why training diverged.

    A worker whose training diverged returns, because a new start from the last checkpoint would take the same step.

    Args:
        job: the stage.
        relay: handle of the Relay actor.
    """
    import ray.train

    train, checkpoints = job.train, job.checkpoints
    adopt(job.lease)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    watch = WorkerWatch(job, rank)
    if rank == 0:
        relay.beat.remote()  # the driver's time begins with that of the workers
    module = job.init.build(train.loss_chunk).eval()  # no dropout, as in the paper; a resumed step repeats exactly
    if train.activation_checkpointing:
        checkpoint_layers(module)
    engine = strategy.build_engine(module, train, checkpoints)
    average = strategy.MovingAverage(engine, train.ema) if train.ema else None
    start = strategy.load_checkpoint(engine, average, checkpoints)
    progress = Progress(job, start, relay if rank == 0 else None)
    shard = ray.train.get_dataset_shard("train")
    batches = shard.iter_batches(batch_size=train.batch // world, batch_format="pyarrow", prefetch_batches=2)
    own_key = derive_key(job.seed, job.stage, "own")
    for step, rows in progress.waits(zip(range(start, train.steps), batches, strict=False)):
        check_order(rows, step, train.batch)
        set_learning_rates(engine.optimizer.param_groups, step, train)
        batches_of_step = micro_batches(job, rows, train.micro_batch, own_key, on_policy_fraction(step, train))
        sums = optimizer_step(engine, batches_of_step)
        if _diverged(job, step, strategy.figures(engine, sums), rank):
            watch.close()
            return
        if average:
            average.update(step)
        progress.stepped(step, rows, sums)
        watch.step()
        if (step + 1) % train.checkpoint_every == 0 and step + 1 < train.steps:
            strategy.save_checkpoint(engine, average, checkpoints, step + 1)
            progress.saved()
    if progress.step != train.steps:
        raise RuntimeError(f"the data of stage {job.stage} ended at step {progress.step} of {train.steps}")
    weights = strategy.whole_weights(engine, average)
    if rank == 0:
        export(job, weights)
    if uri_of(checkpoints):  # the copies of this node
        shutil.rmtree(checkpoints, ignore_errors=True)
    watch.close()


def _diverged(job: TrainJob, step: int, figures: StepFigures, rank: int) -> bool:
    """Whether a step went wrong, which all ranks see alike; then rank 0 leaves the reason in the folder of the stage."""
    try:
        figures.check(job.train.max_loss)
    except Diverged as error:
        if rank == 0:
            good = latest_checkpoint(job.checkpoints)
            place = address(job.checkpoints / good["tag"]) if good else None
            atomic_write(job.place / DIVERGED, explain(error, step, job.train, (job.store, job.seed), place))
        return True
    return False


def check_order(rows: pa.Table, step: int, batch: int) -> None:
    """Check that the rows of a step are those that its number determines, on which exact resuming depends.

    Raises RuntimeError when a row belongs to another step.
    """
    positions = positions_of(rows)
    if positions.min() < step * batch or positions.max() >= (step + 1) * batch:
        raise RuntimeError(
            f"step {step} received row positions {positions.min()} to {positions.max()}, expected "
            f"[{step * batch}, {(step + 1) * batch}): Ray Data handed out blocks in another order than planned"
        )


def begin(job: TrainJob) -> None:
    """Write the model that a stage begins with to the folder of the stage, which has nothing to learn."""
    model: Any = job.init.build().model
    write_model(job, model)


def export(job: TrainJob, weights: dict[str, torch.Tensor]) -> None:
    """Write the model of the stage with its trained weights. Its frozen weights are bit by bit those that it began with.

    Args:
        weights: float32 weights by their names in the module that was trained, as `whole_weights` returns them.
    """
    model: Any = job.init.build().model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {f"model.{name}" for name in parameters} == set(weights), "engine and model disagree on parameter names"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[f"model.{name}"])
    fit_candidates(job, model)
    write_model(job, model)


def write_model(job: TrainJob, model: Any) -> None:
    """Save a model to the folder of the stage, once it has been read back from there and computes the same.

    `config.json` comes last, so a folder that has one is complete.
    """
    job.place.mkdir(parents=True, exist_ok=True)  # the copy of a URI may not be on this node yet
    with added_files(job.place, last="config.json") as partial:
        save_checked(model, partial)
