"""The one seam for tracking: a JSONL log always, MLflow as far as it can be reached, progress lines for people.

MLflow runs in the driver alone. Train workers hand their metrics to the `Relay` actor without waiting; a thread of the
driver drains it. So a slow, dead or unreachable tracking server delays that thread and nothing else, and sqlite is
only ever written from one process.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.config.overrides import leaves
from pipelines.config.saved import CONFIG_FILE
from pipelines.config.stages import RunSpec
from pipelines.data.tokenise import Prepared
from pipelines.files import write_json
from pipelines.tracking.flavour import log_flavour
from pipelines.tracking.mlflow_client import mlflow_client, open_experiment, tracking_uri
from pipelines.tracking.registry import model_files

_RETRY_AFTER_S = 30.0
LOG = "log.jsonl"
Record = dict[str, Any]


class Tracker:
    """A parent run for the pipeline and a child run for each stage, with the same metric keys in every child.

    Args:
        run: the run that is tracked.
        params: its config, as nested dictionaries.
        drain: takes the records that train workers have left since the last call.
    """

    def __init__(self, run: RunSpec, params: dict[str, Any], drain: Callable[[], list[Record]]):
        self.run, self.params, self.drain = run, params, drain
        self.uri = tracking_uri(run.tracking.uri, run.root.parent)
        self.log = run.root / LOG
        self.client: Any = None
        self.prepared: Prepared | None = None
        self._open: tuple[str, str, dict[str, Any]] | None = None
        self._quiet_until, self._failing = 0.0, False
        self._state_file = run.root / "mlflow.json"

    @property
    def _state(self) -> dict[str, Any]:
        state = made_by(self.run.root)
        return state if state.get("uri") == self.uri else {}

    @property
    def parent(self) -> str | None:
        """Run id of the pipeline, None while MLflow has not been reached."""
        return self._state.get("parent")

    @property
    def children(self) -> dict[str, str]:
        """Run ids by `<stage>-<fingerprint>`."""
        return self._state.get("children", {})

    def write(self, **record: Any) -> None:
        """Append a record to the run's JSONL log."""
        with open(self.log, "a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")

    def _safely(self, call: Callable[[], Any]) -> Any:
        """Run an MLflow call; an outage is said once, and MLflow is left alone for a while after each failure."""
        if time.monotonic() < self._quiet_until:
            return None
        try:
            result = call()
            self._failing = False
            return result
        except Exception as error:
            self._quiet_until = time.monotonic() + _RETRY_AFTER_S
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            text = f"tracking to {self.uri} failed, training goes on ({type(error).__name__}: {reason}); see {self.log}"
            if not self._failing:
                print(f"warning  {text}", file=sys.stderr, flush=True)
            self._failing = True
            self.write(event="tracking_failed", error=text)
            return None

    def begin(self, prepared: Prepared) -> None:
        """Record the whole config and the dataset."""
        self.prepared = prepared
        self.write(event="config", **{path: str(value) for path, value in leaves(self.params)})
        self._mlflow(lambda client: None)

    def _mlflow(self, call: Callable[[Any], Any]) -> Any:
        """Run a call with a connected client; None when MLflow is off or out of reach."""
        if self.uri == "off":
            return None
        if self.client is None:
            self.client = self._safely(self._connect)
        return self._safely(lambda: call(self.client)) if self.client is not None else None

    def _connect(self) -> Any:
        """A client whose experiment and parent run exist."""
        client = mlflow_client(self.uri)
        if self.parent and self._still_there(client, self.parent):
            client.update_run(self.parent, status="RUNNING")
            return client
        root = self.run.root
        experiment = open_experiment(client, self.uri, self.run.tracking.experiment, root.parent)
        run = client.create_run(experiment, run_name=f"{self.run.recipe} {root.name}").info.run_id
        self._describe(client, run, self.params)
        client.log_artifact(run, str(root / CONFIG_FILE))
        write_json(self._state_file, {"uri": self.uri, "experiment": experiment, "parent": run, "children": {}})
        return client

    def _still_there(self, client: Any, run: str) -> bool:
        """Whether a run this directory remembers is still in the store."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_run(run).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _describe(self, client: Any, run: str, params: dict[str, Any]) -> None:
        """Parameters and dataset inputs of a new run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        values = [Param(path, str(value)[:500]) for path, value in leaves(params)]
        for start in range(0, len(values), 100):
            client.log_batch(run, params=values[start : start + 100])
        assert self.prepared is not None, "begin() comes first"
        for split, facts in self.prepared.facts().items():
            dataset = Dataset(
                name=f"{self.run.corpus.data.source}:{split}"[-500:],
                digest=self.prepared.id,
                source_type="local",
                source=json.dumps({"uri": str(self.prepared.split(split))}),
                profile=json.dumps(facts),
            )
            client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", split)])])

    @contextmanager
    def stage(self, name: str, fingerprint: str, params: dict[str, Any]) -> Iterator[None]:
        """A child run; records that workers leave while it is open are logged to it and printed."""
        self.write(event="stage_started", stage=name, fingerprint=fingerprint)
        self._open = (name, fingerprint, params)
        self._run()
        done = threading.Event()
        pump = threading.Thread(target=self._pump, args=(done,), daemon=True)
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
            self.write(event="stage_ended", stage=name, status=status)
            self._on_run(lambda client, run: client.set_terminated(run, status))
            self._open = None

    def _run(self) -> str | None:
        """The open stage's child run, made now if MLflow was out of reach before; the parent outside stages."""
        if self._open is None:
            return self.parent
        name, fingerprint, params = self._open
        found = self.children.get(f"{name}-{fingerprint}")
        return found or self._mlflow(lambda client: self._open_child(client, name, fingerprint, params))

    def _on_run(self, call: Callable[[Any, str], Any]) -> Any:
        run = self._run()
        return self._mlflow(lambda client: call(client, run)) if run else None

    def _open_child(self, client: Any, name: str, fingerprint: str, params: dict[str, Any]) -> str:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        state = self._state
        tags = {MLFLOW_PARENT_RUN_ID: state["parent"], "stage": name, "fingerprint": fingerprint}
        run = client.create_run(state["experiment"], tags=tags, run_name=name).info.run_id
        self._describe(client, run, params)
        state["children"][f"{name}-{fingerprint}"] = run
        write_json(self._state_file, state)
        return run

    def _pump(self, done: threading.Event) -> None:
        assert self._open is not None
        fingerprint = self._open[1]
        while True:
            last = done.wait(0.5)
            try:
                records = self.drain()
            except Exception as error:  # the mailbox restarts empty; training does not depend on it
                self.write(event="records_lost", error=str(error)[:500])
                records = []
            for record in records:
                self.write(event="train", fingerprint=fingerprint, **record)
                print(progress_line(record), flush=True)
                self.metrics(flatten(record), record["step"])
            if last:
                return

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics to the open child run, or to the parent when no stage is open."""

        def log(client: Any, run: str) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(run, metrics=[Metric(name, float(v), now, step) for name, v in values.items()])

        self._on_run(log)

    def artifact(self, path: Path) -> None:
        """Copy a file to the open child run, or to the parent when no stage is open."""
        self._on_run(lambda client, run: client.log_artifact(run, str(path)))

    def register(self, folder: Path, k: int, fingerprint: str) -> None:
        """Register a finished student as a version of the run's model, with alias `k<k>`, unless it is already."""
        if fingerprint in self._state.get("registered", {}):
            return
        name = self.run.tracking.model_name or f"kforcing-{self.run.recipe}"

        def log(client: Any) -> None:
            from mlflow.exceptions import MlflowException

            run = self.children[f"k{k}-{fingerprint}"]
            for file in model_files(folder):
                client.log_artifact(run, str(file), "model")
            log_flavour(client, run, "model")
            try:
                client.create_registered_model(name, description="Push-forward students; alias k<k> is the newest of k")
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = client.get_run(run).info.artifact_uri.rstrip("/") + "/model"
            version = client.create_model_version(name, source, run_id=run, tags={"k": str(k)})
            client.set_registered_model_alias(name, f"k{k}", version.version)
            state = self._state
            state.setdefault("registered", {})[fingerprint] = version.version
            write_json(self._state_file, state)

        if f"k{k}-{fingerprint}" in self.children:
            self._mlflow(log)

    def finish(self, status: str) -> None:
        """End the parent run."""
        self._mlflow(lambda client: client.set_terminated(self.parent, status))

    def ui_command(self) -> str:
        """How to look at the runs."""
        if self.uri == "off":
            return "tracking is off"
        return (
            f"{sys.executable} -m mlflow ui --backend-store-uri '{self.uri}'"
            if "sqlite" in self.uri
            else f"open {self.uri}"
        )


def made_by(folder: Path) -> Record:
    """What a folder was logged to (`uri`, and the ids of its runs), empty when it was not."""
    file = folder / "mlflow.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """A worker's record as MLflow metrics; lists become `name_1`, `name_2`, …"""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key in ("tokens_seen", "step", "steps", "stage"):
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
