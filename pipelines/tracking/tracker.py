"""The one place that a pipeline reports to: a JSONL log always, MLflow as far as it can be reached, progress lines, and
metrics for Prometheus.

MLflow runs in the driver alone. Train workers hand their metrics to the `Relay` actor without waiting; a thread of the
driver drains it. So a slow, dead or unreachable tracking server delays that thread and nothing else, and sqlite is
only ever written from one process.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kforcing.remote import uri_of
from pipelines.config.overrides import leaves
from pipelines.config.stages import RunSpec
from pipelines.data.tokenise import Prepared
from pipelines.files import strict_json
from pipelines.log import ids, log, without_passwords
from pipelines.runs.stages import run_id
from pipelines.storage import upload
from pipelines.tracking.metrics import RunMetrics
from pipelines.tracking.pipeline_runs import OpenStage, PipelineRuns

LOG = "log.jsonl"
PUSH_S = 60.0
"""Seconds between two uploads of the log of a run directory in object storage."""
KEPT = {"kept": True}
"""For `extra` of a log line whose content the JSONL log has already."""
Record = dict[str, Any]


class Tracker:
    """The log of a run, and its MLflow runs with the same metric keys in every child.

    Args:
        run: the run that is tracked.
        params: its config, as nested dictionaries.
        drain: takes the records that train workers have left since the last call.
    """

    def __init__(self, run: RunSpec, params: dict[str, Any], drain: Callable[[], list[Record]]):
        self.params, self.drain, self.log = params, drain, run.root / LOG
        self.mlflow = PipelineRuns(run, params, self._mlflow_failed)
        self.prometheus = RunMetrics(run.root.name)
        self._cut, self._pushed = _is_cut(self.log), time.monotonic()
        ids.update(run=run_id(run.root) or run.root.name)
        self._lines = LogLines(self)
        log.addHandler(self._lines)

    def write(self, **record: Any) -> None:
        """Append a record to the run's JSONL log, with the ids of the run and of the open stage.

        When that fails, for example because the disk is full, a warning says so, and the run goes on without it.
        """
        line = strict_json({"time": round(time.time(), 3), **ids, **record}) + "\n"
        try:
            with open(self.log, "a") as file:
                file.write("\n" + line if self._cut else line)  # after a failure the last line may be cut
            self._cut = False
        except OSError as error:
            first, self._cut = not self._cut, True
            if first:
                log.warning(
                    f"{self.log} cannot be written ({error.strerror or error}); records are missing from it until it can be",
                    extra=KEPT,
                )

    def _upload_log(self) -> None:
        """Upload what the log of a run directory in object storage has now; a failure costs a warning."""
        if uri_of(self.log) is None:
            return
        self._pushed, snapshot = time.monotonic(), self.log.with_name(".log.jsonl")
        try:
            shutil.copyfile(self.log, snapshot)
            upload(snapshot, self.log)
        except OSError as error:
            log.warning(f"{self.log} is not uploaded ({error}); it will be tried again", extra=KEPT)

    def _mlflow_failed(self, problem: str, first: bool) -> None:
        text = f"{without_passwords(problem)}; see {self.log}"
        if first:
            log.warning(text, extra=KEPT)
        self.write(event="tracking_failed", error=text)

    def begin(self, prepared: Prepared) -> None:
        """Record the whole config and the dataset."""
        self.write(event="config", **{path: str(value) for path, value in leaves(self.params)})
        self.mlflow.begin(prepared)

    @contextmanager
    def stage(self, name: str, fingerprint: str, params: dict[str, Any]) -> Iterator[None]:
        """A child run; records that workers leave while it is open are logged to it and shown as progress."""
        ids["stage"] = name
        self.write(event="stage_started", fingerprint=fingerprint)
        self.prometheus.started(name)
        self.mlflow.open(OpenStage(name, fingerprint, params))
        done = threading.Event()
        pump = threading.Thread(target=self._pump, args=(done, fingerprint), daemon=True)
        pump.start()
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            done.set()
            pump.join(timeout=30)
            self.write(event="stage_ended", status=status)
            self._upload_log()
            ids.pop("stage", None)
            self.prometheus.ended(name)
            self.mlflow.close(status)

    def _pump(self, done: threading.Event, fingerprint: str) -> None:
        """Take the workers' records until the stage has ended and none is left."""
        while True:
            last = done.wait(0.5)
            self.prometheus.repeat()
            if time.monotonic() > self._pushed + PUSH_S:
                self._upload_log()
            try:
                records = self.drain()
            except Exception as error:  # the mailbox restarts empty; training does not depend on it
                self.write(event="records_lost", error=str(error)[:500])
                records = []
            for record in records:
                self.write(event="train", fingerprint=fingerprint, **record)
                log.info(progress_line(record), extra=KEPT)
                self.prometheus.publish(record)
                self.mlflow.metrics(flatten(record), record["step"])
            if last:
                return

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics to the open stage's MLflow run, or to the pipeline's when no stage is open."""
        self.mlflow.metrics(values, step)

    def artifact(self, path: Path) -> None:
        """Copy a file to the open stage's MLflow run, or to the pipeline's when no stage is open."""
        self.mlflow.artifact(path)

    def register(self, folder: Path, k: int, fingerprint: str) -> None:
        """Register a finished student as a version of the run's model, with alias `k<k>`, unless it is already."""
        self.mlflow.register(folder, k, fingerprint)

    def finish(self, status: str, error: str | None = None) -> None:
        """End the pipeline's MLflow run; `error` is what the run ended with."""
        try:
            self.mlflow.finish(status)
        finally:
            self.write(event="run_ended", status=status, **({"error": error} if error else {}))
            self._upload_log()
            log.removeHandler(self._lines)
            ids.clear()

    def ui_command(self) -> str:
        """How to look at the runs."""
        uri = without_passwords(self.mlflow.uri)
        if uri == "off":
            return "tracking is off"
        return f"{sys.executable} -m mlflow ui --backend-store-uri '{uri}'" if "sqlite" in uri else f"open {uri}"


def _is_cut(log: Path) -> bool:
    """Whether the last line of a log has no end: its disk was full, or its writer was killed."""
    if not log.is_file() or not log.stat().st_size:
        return False
    with open(log, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class LogLines(logging.Handler):
    """Keeps the progress lines and warnings of a run in its JSONL log too, as records of the event `line`."""

    def __init__(self, tracker: Tracker):
        super().__init__(logging.INFO)
        self.tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if not hasattr(record, "kept"):
            self.tracker.write(event="line", level=record.levelname.lower(), text=record.getMessage())


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """A worker's record as MLflow metrics; lists become `name_1`, `name_2`, …"""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key in ("tokens_seen", "rows_seen", "saved_at", "step", "steps", "stage"):
            continue
        if isinstance(value, list):
            flat |= {f"train/{key}_{j + 1}": v for j, v in enumerate(value)}
        else:
            flat[f"train/{key}"] = value
    return flat | {"tokens_seen": record["tokens_seen"]}


def progress_line(record: dict[str, Any]) -> str:
    """One readable line: step, loss, match, tokens/s, data wait, ETA."""
    match = " ".join(f"{m:.2f}" for m in record["match"])
    minutes, seconds = divmod(int(record["eta_s"]), 60)
    return (
        f"{record['stage']:<8} step {record['step']}/{record['steps']}  loss {record['loss']:.3f}  match {match}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  data wait {record['data_wait']:.0%}  ETA {minutes}:{seconds:02d}"
    )
