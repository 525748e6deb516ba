"""Training of one stage: Ray Train workers, each a DeepSpeed rank, fed by the stage's streaming dataset.

    driver ── TorchTrainer ──► worker 0 … worker n−1      (DeepSpeed ZeRO, one optimiser step in lockstep)
                                   ▲ its shard of `training_rows`, a few chunks ahead
    driver ◄── Relay actor ◄── worker 0                   (metrics; never waited for)

Checkpoints go to `<stage>/checkpoints`; `latest.json` there is what both the dataset (which rows come next) and the
workers (which step comes next) start from, so a restarted worker group continues at the exact row.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing.losses import CHUNK
from kforcing.model import Design, PushForwardLM
from kforcing.noise import derive_key
from kforcing.recompute import checkpoint_layers
from pipelines import strategy
from pipelines.config import RolloutConfig, TeacherConfig, TrainConfig, node_selector
from pipelines.rollout import RolloutJob, StepPlan, load_ar, peak_gpu_mb, peak_rss_mb, pick_device, training_rows
from pipelines.stages import StageError
from pipelines.step import ARStep, StudentStep, largest, learning_rate, optimizer_step, reduce_sums, to_batch


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


@dataclass(frozen=True)
class AR:
    """A Llama-style model from scratch."""

    config: TeacherConfig
    vocab_size: int
    eos: int
    seed: int

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """A new causal LM, the same on every worker."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.config.hidden,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            intermediate_size=self.config.mlp,
            max_position_embeddings=self.config.max_positions,
            bos_token_id=self.eos,
            eos_token_id=self.eos,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        return ARStep(model, chunk)


@dataclass(frozen=True)
class Wrapped:
    """A student with an AR model's weights and a new read-out."""

    teacher: str
    k: int
    design: Design
    loss: str
    seed: int

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """The wrapped teacher, the same on every worker."""
        torch.manual_seed(self.seed)
        student = PushForwardLM.from_backbone(load_ar(self.teacher), self.k, self.design)
        return StudentStep(student, self.loss, chunk)


@dataclass(frozen=True)
class Grown:
    """A student with another student's weights and a larger k."""

    previous: str
    k: int
    loss: str

    def build(self, chunk: int = CHUNK) -> nn.Module:
        """The previous student, told its new k."""
        student = PushForwardLM.from_pretrained(self.previous)
        student.set_k(self.k)
        return StudentStep(student, self.loss, chunk)


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
        own = derive_key(job.seed, job.stage, "own"), own_share(step, train)
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


def own_share(step: int, train: TrainConfig) -> float:
    """Share of a step's sequences whose windows the student itself rolls out."""
    return train.own_windows if step >= train.own_from * train.steps else 0.0


def check_order(rows: pa.Table, step: int, batch: int) -> None:
    """Raise RuntimeError unless a step's rows are the ones its number says: what makes resuming exact."""
    positions = rows["position"].to_numpy()
    if positions.min() < step * batch or positions.max() >= (step + 1) * batch:
        raise RuntimeError(
            f"step {step} received row positions {positions.min()} to {positions.max()}, expected "
            f"[{step * batch}, {(step + 1) * batch}): Ray Data handed out blocks in another order than planned"
        )


class Relay:
    """A mailbox between train workers and the driver; runs as an actor."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        """Leave a record."""
        self.records.append(record)

    def drain(self) -> list[dict[str, Any]]:
        """Take all records."""
        taken, self.records = self.records, []
        return taken


class Progress:
    """What a rank has done since the last report, and the report."""

    def __init__(self, job: TrainJob, start: int, relay: Any | None):
        self.job, self.relay, self.step = job, relay, start
        self.first, self.began = start, time.monotonic()
        self.wait = 0.0
        self.mark, self.tokens = self.began, 0

    def waits(self, batches: Iterator[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
        """The same batches, with the time spent waiting for each counted."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if self.step == self.first:  # the pipeline is starting: report it apart from steady waiting
                self.began = self.mark = time.monotonic()
            else:
                self.wait += time.monotonic() - asked
            yield batch

    def stepped(self, step: int, rows: pa.Table, sums: Any) -> None:
        """Count a finished step; every `log_every` steps reduce over ranks and report."""
        self.step = step + 1
        self.tokens += sums.tokens * self.job.train.workers
        if self.step % self.job.train.log_every and self.step != self.job.train.steps:
            return
        # Chunks come to one rank after the other, and who has its rows waits inside the step for who does not.
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
            "data_wait": wait / (now - self.mark),
            "eta_s": (now - self.began) / (self.step - self.first) * (self.job.train.steps - self.step),
            "train_rss_mb": peak_rss_mb(),
            "train_gpu_mb": peak_gpu_mb(),
        }
        if self.job.rollout_job is not None:
            record["actors"] = self.job.rollout.actors
        for name in ("rollout_s", "rollout_rss_mb", "rollout_gpu_mb"):
            if name in rows.column_names:
                record[name] = rows[name][0].as_py()
        self.relay.put.remote(record)
        self.wait, self.mark, self.tokens = 0.0, now, 0


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
