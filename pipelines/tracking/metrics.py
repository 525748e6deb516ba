"""What Prometheus sees of a run: gauges and counters that Ray exports on the metrics port of each node.

    driver         Tracker ─────► stage, step, tokens, loss, waiting, checkpoint    from the records of train workers
                   fit ─────────► diverged
    rollout actor  RolloutActor ► the furthest row that it has rolled out

Ray writes `ray_` before each name. It forgets a gauge that was not set for 20 s (twice `metrics_report_interval_ms`), so the
tracker repeats its own while a stage runs; counters stay with their node. Every metric has the labels `run` (name of the run
directory) and `stage`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

LABELS = ("run", "stage")
GAUGES = {
    "kforcing_stage_running": "1 while a stage runs, 0 when it has just ended.",
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


class RunMetrics:
    """The metrics of a run that its driver exports.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str):
        self.run = run
        self._gauges: dict[str, dict[str, float]] = {}

    def started(self, stage: str) -> None:
        """Show that a stage runs."""
        self._gauges[stage] = {"kforcing_stage_running": 1.0}
        self.repeat()

    def ended(self, stage: str) -> None:
        """Show that it has ended; its other gauges go."""
        self._gauges.pop(stage, None)
        set_gauge("kforcing_stage_running", 0, self.run, stage)

    def publish(self, record: dict[str, Any]) -> None:
        """Show a record of a train worker, as `pipelines.training.progress` makes it.

        One that comes after the end of its stage is counted, and sets no gauge.
        """
        stage, seconds = record["stage"], record["seconds"]
        gauges = {"step": "train_step", "steps": "train_steps", "loss": "train_loss", "rows_seen": "train_rows"}
        for key, name in (gauges | {"saved_at": "checkpoint_timestamp_seconds"}).items():
            if key in record:
                self._gauges.get(stage, {})[f"kforcing_{name}"] = record[key]
        self.repeat()
        count("kforcing_train_tokens_total", record["tokens_per_s"] * seconds, self.run, stage)
        count("kforcing_train_seconds_total", seconds, self.run, stage)
        count("kforcing_train_wait_seconds_total", record["data_wait"] * seconds, self.run, stage)

    def repeat(self) -> None:
        """Set all gauges of the stages that run again, so that Ray keeps them."""
        for stage, gauges in list(self._gauges.items()):
            for name, value in list(gauges.items()):
                set_gauge(name, value, self.run, stage)
