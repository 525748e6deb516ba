"""Rollouts that are written to Parquet once and trained on for several epochs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from kforcing.remote import address, local
from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.data.rows import positions_of, without_place
from pipelines.data.token_store import (
    TokenStore,
    is_complete,
    shard_entries,
    write_manifest,
    write_shard,
)
from pipelines.log import log
from pipelines.rollouts.plan import ReadChunk, RolloutJob, StepPlan
from pipelines.rollouts.stream import _rolled_out
from pipelines.runs.stages import Stage


def cache_rollouts(
    stage: Stage, store: str, seed: int, train: TrainConfig, rollout: RolloutConfig, job: RolloutJob
) -> str:
    """Write the rollouts of `steps · batch / cache_epochs` rows to Parquet, unless they exist. Returns the store.

    Shards are written atomically under names that follow from their rows, so an interrupted run writes only the missing ones,
    and a shard that was changed is written again.
    """
    folder = stage.folder / "rollouts"
    folder.mkdir(exist_ok=True)
    if is_complete(folder):
        return address(folder)
    per_epoch = TokenStore(store, seed).rows_per_epoch
    rows = min(per_epoch, -(-train.steps * train.batch // rollout.cache_epochs))
    epochs = train.steps * train.batch / rows
    if epochs > rollout.cache_epochs:
        log.info(f"{stage.name}  the corpus has {rows} rows: cached rollouts will be trained on {epochs:.1f} times")
    # One shard for every `batch` rows: a plan of one worker and one step a chunk numbers them.
    plan = StepPlan(train.batch, 1, -(-rows // train.batch), 0, 1)
    entries = shard_entries(folder)
    done = {entry["file"] for entry in entries}
    missing = [i for i in range(plan.chunks) if f"{_shard_name(i)}.parquet" not in done]
    started = time.monotonic()
    for entry in _write_shards(missing, folder, ReadChunk(store, seed, plan), job, rollout) if missing else ():
        entries.append(entry)
        log.info(f"{stage.name}  cached rollouts  {len(entries)}/{plan.chunks} shards")
    write_manifest(folder, entries, seconds=round(time.monotonic() - started, 2), written=len(missing))
    return address(folder)


def _shard_name(chunk: int) -> str:
    return f"rollout-{chunk:08d}"


def _write_shards(chunks: list[int], folder: Path, read: ReadChunk, job: RolloutJob, rollout: RolloutConfig) -> Any:
    import ray.data

    batch, place = read.plan.batch, address(folder)

    def write(table: pa.Table) -> pa.Table:
        shards = []
        for start in range(0, len(table), batch):
            rows = table.slice(start, batch)
            name = _shard_name(int(positions_of(rows)[0]) // batch)
            shards.append(write_shard(local(place), name, without_place(rows)))
        return pa.Table.from_pylist(shards)

    rows = ray.data.from_items([{"id": i} for i in chunks], override_num_blocks=len(chunks)).map_batches(
        read, batch_format="pyarrow", batch_size=1
    )
    return (
        _rolled_out(rows, job, rollout, batch).map_batches(write, batch_format="pyarrow", batch_size=batch).iter_rows()
    )
