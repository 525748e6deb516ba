"""What a stage cost: read from its training records, and which side of a streaming stage holds up the other."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from pipelines.config.stages import StageSpec
from pipelines.tracking.tracker import LOG

Record = dict[str, Any]


def training_log(root: Path, stage: str, fingerprint: str) -> list[Record]:
    """The training records of one stage in order; of a step seen twice (resumed runs) the later one."""
    steps: dict[int, Record] = {}
    for line in (root / LOG).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if (record.get("event"), record.get("stage"), record.get("fingerprint")) == ("train", stage, fingerprint):
            steps[record["step"]] = record
    return [steps[step] for step in sorted(steps)]


def cost_of(records: list[Record]) -> Record:
    """Steps, seconds and medians of a stage's training records."""
    if not records:
        return {}
    cost = {
        "steps": records[-1]["step"],
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records),
        "data_wait": sum(r["data_wait"] * r["seconds"] for r in records) / sum(r["seconds"] for r in records),
    }
    if "actors" in records[-1]:  # rolled out while training, by as many as there were then
        cost["actors"] = records[-1]["actors"]
    if seconds := [r["rollout_s"] for r in records if "rollout_s" in r]:
        cost["rollout_s"] = statistics.median(seconds)
    for name in ("train_rss_mb", "train_gpu_mb", "rollout_rss_mb", "rollout_gpu_mb"):
        if peaks := [r[name] for r in records if name in r]:
            cost[name] = max(peaks)
    return cost


def student_cost(records: list[Record], spec: StageSpec) -> Record:
    """`cost_of` a student stage, with the balance of rollouts and training where it rolled out while it trained."""
    cost = cost_of(records)
    if "actors" in cost:
        step_s = cost["seconds"] * (1 - cost["data_wait"]) / cost["steps"]
        cost["balance"] = balance(cost["rollout_s"], cost.pop("actors"), step_s, spec.train.batch)
    return cost


def balance(rollout_s: float, actors: int, step_s: float, rows: int) -> Record:
    """Which side of a streaming stage holds up the other, and how many rollout actors would make them equally fast.

    More actors are taken to make more rows: that is so where they and the train workers share no device, and not on one
    machine whose cores are all in use.

    Args:
        rollout_s: seconds that one actor takes for a row.
        actors: rollout actors.
        step_s: seconds of a training step, without those it waited for rows.
        rows: rows of a step, over all workers.
    """
    made, used = actors / rollout_s, rows / step_s
    return {
        "rollout_rows_per_s": made,
        "train_rows_per_s": used,
        "bottleneck": "rollouts" if made < used else "training",
        "actors": actors,
        "balanced_actors": math.ceil(rollout_s * used),
    }


def balance_line(cost: Record) -> str:
    """A stage's balance in words."""
    b = cost["balance"]
    actors = f"{b['actors']} rollout actors make" if b["actors"] > 1 else "1 rollout actor makes"
    return (
        f"{actors} {b['rollout_rows_per_s']:.1f} rows/s, training could use {b['train_rows_per_s']:.1f} and waited "
        f"{cost['data_wait']:.0%} of its time: the bottleneck is {b['bottleneck']}, "
        f"rollout.actors={b['balanced_actors']} would balance them, given devices of their own"
    )
