"""The MLflow runs of a pipeline: a parent for the run directory, a child for each stage, and registered students.

`mlflow.json` in the run directory remembers their ids, so that the next start continues them:

    {"uri": …, "experiment": id, "parent": run id, "children": {"<stage>-<fingerprint>": run id},
     "models": {run id: id of its logged model}, "uploaded": {fingerprint: id of the logged model, or of the run, that has
     the files}, "registered": {fingerprint: version}, "owed": [what MLflow has not taken yet]}
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kforcing.remote import address, local
from pipelines.config.overrides import leaves
from pipelines.config.saved import CONFIG_FILE
from pipelines.config.stages import RunSpec
from pipelines.data.tokenise import Prepared
from pipelines.files import read_json, write_json
from pipelines.tracking.logged_model import logged_model, upload
from pipelines.tracking.mlflow_client import log_params, mlflow_client, open_experiment, source_tags, tracking_uri

_RETRY_AFTER_S = 30.0
WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Pauses at the end of a run before MLflow is tried again."""
STATE_FILE = "mlflow.json"


@dataclass(frozen=True)
class OpenStage:
    """The stage that runs now."""

    name: str
    fingerprint: str
    params: dict[str, Any]

    @property
    def key(self) -> str:
        """Its name in `children`."""
        return f"{self.name}-{self.fingerprint}"


@dataclass(frozen=True)
class Debt:
    """What MLflow has to take in the end: it is remembered until MLflow has taken it."""

    kind: str
    """`status` of a run, `artifact` of a run, or registered `model` of a stage."""
    value: str
    """The status, or the path or URI of the file or of the student's folder."""
    stage: OpenStage | None
    """Whose run it belongs to; None for the parent."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later debt replaces: a run has one status and one model, and any number of files."""
        return self.kind, self.stage.key if self.stage else "", self.value if self.kind == "artifact" else ""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Debt:
        """The debt whose `dataclasses.asdict` this is."""
        return cls(**{**record, "stage": OpenStage(**record["stage"]) if record["stage"] else None})

    def __str__(self) -> str:
        return f"{self.kind} of {self.stage.name if self.stage else 'the run'}"


class PipelineRuns:
    """Logs to MLflow as far as it can be reached. No call raises, and after a failure MLflow is left alone for a while.

    Metrics that could not be logged are left out. The status of runs, files and registered students are tried again: by
    later calls, at the end of the run, and at its next start. What the server refuses, for example for want of a
    permission, is named and waits for the next start; the rest goes on. Two threads may call it.

    Args:
        run: the run that is tracked.
        params: its config, as nested dictionaries.
        failed: takes a description of each failure, and whether it is the first one after a success.
    """

    def __init__(self, run: RunSpec, params: dict[str, Any], failed: Callable[[str, bool], None]):
        self.run, self.params, self.failed = run, params, failed
        self.uri = tracking_uri(run.tracking.uri, run.root.parent)
        self.stage: OpenStage | None = None
        self.prepared: Prepared | None = None
        self._client: Any = None
        self._quiet_until, self._failing = 0.0, False
        self._refused: list[Debt] = []
        self._unsaved: dict[str, Any] | None = None
        """The state while it cannot be written."""
        self._lock = threading.RLock()

    @property
    def _state(self) -> dict[str, Any]:
        if self._unsaved is not None:
            return self._unsaved
        state = made_by(self.run.root)
        return state if without_user(state.get("uri", "")) == without_user(self.uri) else {}

    def _remember(self, **changed: Any) -> None:
        """Replace entries of the state; the lock is held. A disk that is full costs a warning, not the run."""
        state = {**self._state, "uri": without_user(self.uri), **changed}
        try:
            write_json(self.run.root / STATE_FILE, state)
            self._unsaved = None
        except OSError as error:
            first, self._unsaved = self._unsaved is None, state
            problem = f"{self.run.root / STATE_FILE} cannot be written ({error.strerror or error})"
            self.failed(f"{problem}: if the run ends now, the next start does not know its MLflow runs", first)

    @property
    def parent(self) -> str | None:
        """Run id of the pipeline, None while MLflow has not been reached."""
        return self._state.get("parent")

    @property
    def children(self) -> dict[str, str]:
        """Run ids by `<stage>-<fingerprint>`."""
        return self._state.get("children", {})

    def begin(self, prepared: Prepared) -> None:
        """Open the parent run: a new one with config and dataset, or the one that the run directory remembers."""
        self.prepared = prepared
        self._call(lambda client: None)
        self._pay()

    def open(self, stage: OpenStage) -> None:
        """Log to the stage's child run from now on."""
        self.stage = stage
        self._current()

    def close(self, status: str) -> None:
        """End the child run; later calls log to the parent."""
        self._owe(Debt("status", status, self.stage))
        self.stage = None

    def finish(self, status: str) -> None:
        """End the parent run. What MLflow has not taken is tried again for some seconds, and then named."""
        if self.prepared is None:  # the run ended before MLflow heard of it
            return
        self._owe(Debt("status", status, None))
        for wait in WAITS_S if self._client is not None and status != "KILLED" else ():
            if not self._due:
                break
            time.sleep(wait)
            self._quiet_until = 0.0
            self._pay()
        if self._owed:
            missing = ", ".join(str(debt) for debt in self._owed)
            self.failed(
                f"MLflow at {self.uri} has not received: {missing}. The next start of this run tries again", True
            )

    @property
    def _owed(self) -> list[Debt]:
        """What MLflow has not taken yet, this time or at an earlier start; in `mlflow.json`."""
        return [Debt.of(record) for record in self._state.get("owed", [])]

    @property
    def _due(self) -> list[Debt]:
        """What this start of the run still tries."""
        return [debt for debt in self._owed if debt not in self._refused]

    def _owe(self, new: Debt) -> None:
        """Add to what MLflow has to take, and try all of it."""
        if self.uri == "off":
            return
        with self._lock:
            debts = [*(debt for debt in self._owed if debt.key != new.key), new]
            self._remember(owed=[dataclasses.asdict(debt) for debt in debts])
            self._pay()

    def _pay(self) -> None:
        """Try all that is due, until MLflow is out of reach."""
        with self._lock:
            for debt in self._due:
                if not self._call(partial(self._settle, debt)):
                    return
                if debt not in self._refused:
                    self._remember(owed=[dataclasses.asdict(other) for other in self._owed if other != debt])

    def _settle(self, debt: Debt, client: Any) -> bool:
        """Whether MLflow has answered: it took the debt, or refused it."""
        try:
            self._give(debt, client)
        except Exception as error:
            if not _is_refusal(error):
                raise
            self._refused.append(debt)
            self.failed(f"MLflow at {self.uri} refuses the {debt} ({_one_line(error)})", True)
        return True

    def _give(self, debt: Debt, client: Any) -> None:
        run: Any = self.parent
        if debt.stage is not None:
            run = self.children.get(debt.stage.key) or self._open_child(client, debt.stage)
        if debt.kind == "status":
            client.set_terminated(run, debt.value)
        elif debt.kind == "model":
            assert debt.stage is not None
            self._register(client, run, local(debt.value), debt.stage)
        elif (file := local(debt.value)).is_file():
            client.log_artifact(run, str(file))

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log metrics to the open child run, or to the parent when no stage is open."""

        def log(client: Any, run: str) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(run, metrics=[Metric(name, float(v), now, step) for name, v in values.items()])

        self._on_run(log)

    def artifact(self, path: Path) -> None:
        """Copy a file to the open child run, or to the parent when no stage is open."""
        self._owe(Debt("artifact", address(path), self.stage))

    def register(self, folder: Path, k: int, fingerprint: str) -> None:
        """Register a finished student as a version of the run's model, with alias `k<k>`, unless it is already."""
        stage = OpenStage(f"k{k}", fingerprint, {"k": k})
        known = {*self.children, *(debt.stage.key for debt in self._owed if debt.stage)}
        if stage.key in known and fingerprint not in self._state.get("registered", {}):
            self._owe(Debt("model", address(folder), stage))

    def _register(self, client: Any, run: str, folder: Path, stage: OpenStage) -> None:
        from mlflow.exceptions import MlflowException

        name = self.run.tracking.model_name or f"kforcing-{self.run.recipe}"
        try:
            client.create_registered_model(name, description="Push-forward students; alias k<k> is the newest of k")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags, models = {"k": str(stage.params["k"])}, self._state.get("models", {})
        model = logged_model(client, run, stage.name, tags, models.get(run))
        if model:
            self._remember(models={**models, run: model.model_id})
        place, uploaded = model.model_id if model else run, self._state.get("uploaded", {})
        if uploaded.get(stage.fingerprint) != place:
            upload(client, run, folder, model)
            self._remember(uploaded={**uploaded, stage.fingerprint: place})
        source = model.artifact_location if model else client.get_run(run).info.artifact_uri.rstrip("/") + "/model"
        given = {"model_id": model.model_id} if model else {}
        version = client.create_model_version(name, source, run_id=run, tags=tags, **given)
        client.set_registered_model_alias(name, stage.name, version.version)
        self._remember(registered={**self._state.get("registered", {}), stage.fingerprint: version.version})

    def _call(self, call: Callable[[Any], Any]) -> Any:
        """Run a call with a connected client; None when MLflow is off or out of reach."""
        if self.uri == "off":
            return None
        with self._lock:
            if self._client is None:
                self._client = self._safely(self._connect)
            return self._safely(lambda: call(self._client)) if self._client is not None else None

    def _safely(self, call: Callable[[], Any]) -> Any:
        if time.monotonic() < self._quiet_until:
            return None
        try:
            result = call()
            self._failing = False
            return result
        except Exception as error:
            self._quiet_until = time.monotonic() + _RETRY_AFTER_S
            first, self._failing = not self._failing, True
            self.failed(f"tracking to {self.uri} failed, training goes on ({_one_line(error)})", first)
            return None

    def _connect(self) -> Any:
        """A client whose experiment and parent run exist."""
        client = mlflow_client(self.uri)
        if self.parent and _still_there(client, self.parent):
            client.update_run(self.parent, status="RUNNING")
            return client
        root = self.run.root
        experiment = open_experiment(client, self.uri, self.run.tracking.experiment, root.parent)
        run = client.create_run(experiment, run_name=f"{self.run.recipe} {root.name}", tags=source_tags()).info.run_id
        self._describe(client, run, self.params)
        client.log_artifact(run, str(root / CONFIG_FILE))
        self._remember(experiment=experiment, parent=run, children={}, uploaded={}, registered={})
        return client

    def _describe(self, client: Any, run: str, params: dict[str, Any]) -> None:
        """Parameters and dataset inputs of a new run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        log_params(client, run, leaves(params))
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

    def _on_run(self, call: Callable[[Any, str], Any]) -> Any:
        run = self._current()
        return self._call(lambda client: call(client, run)) if run else None

    def _current(self) -> str | None:
        """The open stage's child run, made now if MLflow was out of reach before; the parent outside stages."""
        stage = self.stage
        if stage is None:
            return self.parent
        return self.children.get(stage.key) or self._call(lambda client: self._open_child(client, stage))

    def _open_child(self, client: Any, stage: OpenStage) -> str:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        state = self._state
        if stage.key in state["children"]:  # the other thread was first
            return str(state["children"][stage.key])
        tags = {MLFLOW_PARENT_RUN_ID: state["parent"], "stage": stage.name, "fingerprint": stage.fingerprint}
        run = client.create_run(state["experiment"], tags=source_tags() | tags, run_name=stage.name).info.run_id
        self._describe(client, run, stage.params)
        self._remember(children={**self.children, stage.key: run})
        return run


def _is_refusal(error: Exception) -> bool:
    """Whether the server has answered, and would answer the same to a second try: 4xx, without "later" and "too many"."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:  # of a file's upload
        status = error.response.status_code
    else:
        return False
    return 400 <= status < 500 and status not in (408, 425, 429)


def _one_line(error: Exception) -> str:
    """Kind of an error and the beginning of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _still_there(client: Any, run: str) -> bool:
    """Whether a run that a directory remembers is still in the store."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def made_by(folder: Path) -> dict[str, Any]:
    """What a folder was logged to (`uri`, and the ids of its runs), empty when it was not.

    A user and a password are not kept: the URI is that of `MLFLOW_TRACKING_URI` where they are the same without them.
    """
    state = read_json(folder / STATE_FILE) or {}
    if not state:
        return {}
    given, plain = os.environ.get("MLFLOW_TRACKING_URI", ""), without_user(state["uri"])
    return {**state, "uri": given if without_user(given) == plain else plain}


def without_user(uri: str) -> str:
    """A URI without the user and the password in it."""
    return re.sub(r"(://)[^/?#\s]*@", r"\1", uri)
