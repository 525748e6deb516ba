"""Rollouts: the frozen teacher of a stage turns token blocks into training targets, on its own actors.

    chunk numbers ─► read rows (tasks) ─► RolloutActor pool (teacher) ─► train workers, or Parquet when cached
          (Ray Data: every arrow is bounded; a slow consumer stops the producer)

A *chunk* is the rows that one train worker consumes in a few optimiser steps. Which rows those are is a function of
the step numbers alone (`StepPlan`), so a stage is one streaming execution whatever its number of epochs, and
resuming at step s is starting the plan at s.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kforcing.coupling import COUPLINGS
from kforcing.model import Design, PushForwardLM
from kforcing.noise import derive_key, sample_anchors, uniform, window_noise
from kforcing.rollout import ARTeacher, StudentTeacher
from kforcing.staircase import Windows, key_heads
from pipelines.config import NoiseConfig, RolloutConfig, TrainConfig, node_selector
from pipelines.stages import Stage
from pipelines.store import MANIFEST, TokenStore, fixed_list, open_store, to_numpy, write_manifest, write_shard

# Ray plans every chunk ahead; longer stages get longer chunks.
MAX_CHUNKS = 20_000

# Sequences in one forward on a CPU, where nothing is gained by more.
CPU_BATCH = 16


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
        """Rows a worker consumes in a step."""
        return self.batch // self.workers

    def positions(self, chunk: int) -> np.ndarray:
        """Row positions of a chunk: worker chunk % workers, the steps of group chunk // workers."""
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
class RolloutJob:
    """What a rollout actor needs to know: all of it, so that any actor anywhere makes the same rows."""

    teacher: str
    """Folder of the teacher: a `PushForwardLM`, or a Hugging Face causal LM when `ar`."""
    ar: bool
    k: int
    """Target tokens of a window."""
    windows: int
    seed: int
    stage: str
    """Names the noise stream, with the epoch."""
    design: Design
    """The student's: its coupling and temperatures."""
    top_m: int | None
    """How many of the teacher's likeliest tokens label each target; none for tokens alone."""
    batch: int | None
    """Sequences in one forward; none for as many as the device has room for."""
    threads: int
    draws: int = 1
    """Windows of each anchor, with independent noise."""


def load_ar(folder: str, **extra: Any) -> Any:
    """A causal LM in float32 with sdpa attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **extra).eval()


def pick_device() -> torch.device:
    """The GPU Ray gave this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would count what the process that started this one had needed
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_gpu_mb() -> float:
    """Most memory that torch has had in use on this process's GPU so far, in MiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20


class RolloutActor:
    """Holds the frozen teacher; called by Ray Data with rows of tokens, returns them with anchors and targets."""

    def __init__(self, job: RolloutJob):
        torch.set_num_threads(job.threads)
        self.job = job
        self.device = pick_device()
        self.teacher: ARTeacher | StudentTeacher
        if job.ar:
            self.teacher = ARTeacher(load_ar(job.teacher).to(self.device), COUPLINGS[job.design.coupling])
        else:
            self.teacher = StudentTeacher(PushForwardLM.from_pretrained(job.teacher).to(self.device))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Rows of tokens → the same rows with anchors, targets, noise key, temperature and the cost of making them."""
        started = time.monotonic()
        batch = self.job.batch or self._fitting(len(table["tokens"][0]))
        parts = [self._roll_out(table.slice(i, batch)) for i in range(0, len(table), batch)]
        rolled = pa.concat_tables(parts)
        seconds = (time.monotonic() - started) / len(rolled)
        cost = {"rollout_s": seconds, "rollout_rss_mb": peak_rss_mb(), "rollout_gpu_mb": peak_gpu_mb()}
        for name, value in cost.items():
            rolled = rolled.append_column(name, pa.array(np.full(len(rolled), value)))
        return rolled

    def _fitting(self, context: int) -> int:
        if self.device.type != "cuda":
            return CPU_BATCH
        backbone = self.teacher.backbone if isinstance(self.teacher, ARTeacher) else self.teacher.student.backbone
        # With what torch has reserved and does not use, so that the answer does not shrink from call to call.
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        entries = self.job.windows * self.job.draws * self.job.k
        return fitting_batch(free, pass_bytes(backbone, context, entries))

    def _roll_out(self, rows: pa.Table) -> pa.Table:
        job = self.job
        epochs = rows["epoch"].to_numpy()
        keys = np.array([derive_key(job.seed, job.stage, "noise", e) for e in epochs])
        anchor_keys = np.array([derive_key(job.seed, job.stage, "anchors", e) for e in epochs])
        seq = torch.from_numpy(rows["seq"].to_numpy().copy())
        tokens = torch.from_numpy(to_numpy(rows["tokens"]).astype(np.int64))
        anchors = sample_anchors(torch.from_numpy(anchor_keys), seq, tokens.shape[1], job.windows)
        anchors = anchors.repeat_interleave(job.draws, dim=1)
        noise = window_noise(torch.from_numpy(keys), seq, anchors, job.k)
        temperature = draw_temperature(torch.from_numpy(anchor_keys), seq, job.design.noise)
        windows = Windows(*(x.to(self.device) for x in (tokens, anchors, noise, temperature)))
        labels: dict[str, torch.Tensor] = {}
        if job.top_m:
            assert isinstance(self.teacher, ARTeacher), "labels come from the AR teacher"
            targets, soft = self.teacher.labelled_rollout(windows, job.top_m)
            assert soft.ids_BWKM is not None
            labels = {"soft_ids": soft.ids_BWKM.int(), "soft_logp": soft.logp_BWKM}
        else:
            targets = self.teacher.rollout(windows)
        columns = {
            "anchors": fixed_list(anchors.numpy().astype(np.int32)),
            "targets": fixed_list(targets.cpu().numpy().reshape(len(seq), -1).astype(np.int32)),
            "noise_key": pa.array(keys),
            "temperature": pa.array(temperature.numpy()),
            **{name: fixed_list(label.cpu().numpy().reshape(len(seq), -1)) for name, label in labels.items()},
        }
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        return rows


def pass_bytes(backbone: PreTrainedModel, context: int, entries: int) -> int:
    """Memory that one sequence of a rollout needs at most, about: `context` tokens and the `entries` of its blocks.

    Keys and values of all layers, and what one layer works on: a dozen vectors of the model's width for each token that is
    read at once. Logits are made in chunks and left out.
    """
    config: Any = backbone.config
    size = next(backbone.parameters()).element_size()
    heads, width = key_heads(backbone)
    tokens = context + entries
    return size * tokens * (2 * config.num_hidden_layers * heads * width + 12 * config.hidden_size)


def fitting_batch(free: int, sequence: int) -> int:
    """Sequences that fit in half of so many free bytes: a power of two from 1 to 1024."""
    return 2 ** min(10, max(1, free // 2 // sequence).bit_length() - 1)


def draw_temperature(keys_B: torch.Tensor, seq_B: torch.Tensor, noise: NoiseConfig) -> torch.Tensor:
    """One temperature a sequence, uniform in the student's range: (B,) float32."""
    u = uniform(keys_B, seq_B, 0xFFFFFFFE, torch.zeros_like(seq_B)).float()
    return noise.temperature_min + u * (noise.temperature_max - noise.temperature_min)


@dataclass(frozen=True)
class ReadChunk:
    """Chunk numbers to rows of a store; runs in reading tasks."""

    store: str
    seed: int
    plan: StepPlan

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """A column `id` of chunk numbers → their rows."""
        positions = np.concatenate([self.plan.positions(int(c)) for c in chunks["id"].to_numpy()])
        return open_store(self.store, self.seed).read(positions)


def training_rows(store: str, seed: int, plan: StepPlan, job: RolloutJob | None, rollout: RolloutConfig) -> Any:
    """The streaming dataset of a stage: a block a chunk, in order, rolled out by the actor pool when there is a job."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    dataset = ray.data.range(plan.chunks, override_num_blocks=plan.chunks).map_batches(
        ReadChunk(store, seed, plan), batch_format="pyarrow", batch_size=1
    )
    return dataset if job is None else _rolled_out(dataset, job, rollout, plan.rows_per_worker * plan.steps_per_chunk)


def _rolled_out(dataset: Any, job: RolloutJob, rollout: RolloutConfig, rows: int) -> Any:
    """A dataset of token rows through the pool of rollout actors, `rows` of them a call."""
    import ray.data

    return dataset.map_batches(
        RolloutActor,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        # Ray wants a number when there are GPUs; without one a call gets a block, which is a chunk already.
        batch_size=rows if rollout.gpus_per_actor else None,
        num_cpus=rollout.cpus_per_actor,
        num_gpus=rollout.gpus_per_actor or None,
        label_selector=node_selector(rollout.label),
        compute=ray.data.ActorPoolStrategy(size=rollout.actors, max_tasks_in_flight_per_actor=4),
    )


def cache_rollouts(
    stage: Stage, store: str, seed: int, train: TrainConfig, rollout: RolloutConfig, job: RolloutJob, say: Callable
) -> str:
    """Write the rollouts of `steps · batch / cache_epochs` rows to Parquet, once; returns the store's folder.

    Shards are written atomically under names that follow from their rows, and an interrupted run goes on with the
    missing ones.
    """
    folder = stage.folder / "rollouts"
    folder.mkdir(exist_ok=True)
    if (folder / MANIFEST).is_file():
        return str(folder)
    per_epoch = TokenStore(store, seed).rows_per_epoch
    rows = min(per_epoch, -(-train.steps * train.batch // rollout.cache_epochs))
    epochs = train.steps * train.batch / rows
    if epochs > rollout.cache_epochs:
        say(f"{stage.name}  the corpus has {rows} rows: cached rollouts will be trained on {epochs:.1f} times")
    # One shard for every `batch` rows: a plan of one worker and one step a chunk numbers them.
    plan = StepPlan(train.batch, 1, -(-rows // train.batch), 0, 1)
    entries = [{"file": f.name, "rows": pq.ParquetFile(f).metadata.num_rows} for f in folder.glob("*.parquet")]
    done = {entry["file"] for entry in entries}
    missing = [i for i in range(plan.chunks) if f"{_shard_name(i)}.parquet" not in done]
    started = time.monotonic()
    for entry in _write_shards(missing, folder, ReadChunk(store, seed, plan), job, rollout) if missing else ():
        entries.append(entry)
        say(f"{stage.name}  cached rollouts  {len(entries)}/{plan.chunks} shards")
    write_manifest(folder, entries, seconds=round(time.monotonic() - started, 2), written=len(missing))
    return str(folder)


def _shard_name(chunk: int) -> str:
    return f"rollout-{chunk:08d}"


def _write_shards(chunks: list[int], folder: Path, read: ReadChunk, job: RolloutJob, rollout: RolloutConfig) -> Any:
    import ray.data

    batch = read.plan.batch

    def write(table: pa.Table) -> pa.Table:
        shards = []
        for start in range(0, len(table), batch):
            rows = table.slice(start, batch)
            name = _shard_name(rows["position"][0].as_py() // batch)
            shards.append(write_shard(folder, name, rows.drop_columns(["position", "epoch"])))
        return pa.Table.from_pylist(shards)

    rows = ray.data.from_items([{"id": i} for i in chunks], override_num_blocks=len(chunks)).map_batches(
        read, batch_format="pyarrow", batch_size=1
    )
    return (
        _rolled_out(rows, job, rollout, batch).map_batches(write, batch_format="pyarrow", batch_size=batch).iter_rows()
    )
