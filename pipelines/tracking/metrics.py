"""What Prometheus sees of a run: gauges and counters that Ray exports on the metrics port of each node.

    driver         Tracker ─────► stage, step, tokens, loss, waiting, checkpoint    from the records of train workers
                   fit ─────────► diverged
    rollout actor  RolloutActor ► the furthest row that it has rolled out

Ray writes `ray_` before each name. A gauge goes half a minute after its process; a counter stays with its node. Every metric
has the labels `run` (name of the run directory) and `stage`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

LABELS = ("run", "stage")
GAUGES = {
    "kforcing_stage_running": "1 while a stage runs, 0 when it has ended.",
    "kforcing_train_step": "Steps of the stage that are done.",
    "kforcing_train_steps": "Steps of the whole stage.",
    "kforcing_train_loss": "Loss of the newest reported step, in nats a token.",
    "kforcing_train_rows": "Rows of the stage that training has consumed since its first step.",
    "kforcing_rollout_rows": "Rows of the stage up to the furthest one that is rolled out.",
    "kforcing_checkpoint_timestamp_seconds": "Unix time of the newest checkpoint, or of the start of training before it.",
}
COUNTERS = {
    "kforcing_train_tokens_total": "Target tokens that were trained on.",
    "kforcing_train_seconds_total": "Seconds of training, those of waiting included.",
    "kforcing_train_wait_seconds_total": "Seconds for which the slowest train worker waited for rows.",
    "kforcing_diverged_total": "Trainings that stopped because a figure was not finite or the loss exploded.",
}


@cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge

    return Gauge(name, GAUGES[name], LABELS) if name in GAUGES else Counter(name, COUNTERS[name], LABELS)


def set_gauge(name: str, value: float, run: str, stage: str) -> None:
    """Set a gauge of a stage."""
    _metric(name).set(float(value), {"run": run, "stage": stage})


def count(name: str, amount: float, run: str, stage: str) -> None:
    """Add to a counter of a stage; Ray's counters take no zeros."""
    if amount > 0:
        _metric(name).inc(float(amount), {"run": run, "stage": stage})


def publish(record: dict[str, Any], run: str) -> None:
    """Publish a record of a train worker, as `pipelines.training.progress` makes it."""
    stage, seconds = record["stage"], record["seconds"]
    gauges = {"step": "train_step", "steps": "train_steps", "loss": "train_loss", "rows_seen": "train_rows"}
    for key, name in (gauges | {"saved_at": "checkpoint_timestamp_seconds"}).items():
        if key in record:
            set_gauge(f"kforcing_{name}", record[key], run, stage)
    count("kforcing_train_tokens_total", record["tokens_per_s"] * seconds, run, stage)
    count("kforcing_train_seconds_total", seconds, run, stage)
    count("kforcing_train_wait_seconds_total", record["data_wait"] * seconds, run, stage)
