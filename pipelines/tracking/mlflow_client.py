"""MLflow clients, experiments, and batches of parameters and metrics."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock

from kforcing.remote import uri_of
from pipelines.config.section import ConfigError

SQLITE = "sqlite:///"


def tracking_uri(given: str | None, folder: Path) -> str:
    """The MLflow server or store: the given one, else `MLFLOW_TRACKING_URI`, else the file `mlflow.db` in a folder.

    In object storage there can be no such file, so the last of these is `off` there.
    """
    given = given or os.environ.get("MLFLOW_TRACKING_URI") or ("off" if uri_of(folder.absolute()) else None)
    place = str(folder.absolute()).replace("%", "%25").replace("?", "%3F")  # SQLAlchemy decodes the path of a URI
    return given or f"{SQLITE}{place}/mlflow.db"


def mlflow_client(uri: str) -> Any:
    """A client that prints nothing, and gives up early when a server is down."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with one_at_a_time(uri):
        return MlflowClient(uri, registry_uri=uri)


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Hold the lock beside a sqlite file, whose tables two processes would otherwise make at the same time."""
    if not uri.startswith(SQLITE):
        yield
        return
    file = Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        yield


def open_experiment(client: Any, uri: str, name: str, beside: Path) -> str:
    """The id of an experiment, made when it is not there yet. Raises ConfigError when it is a deleted one."""
    with one_at_a_time(uri):
        found = client.get_experiment_by_name(name)
        if found and found.lifecycle_stage != "active":
            raise ConfigError(
                f"experiment {name!r} is deleted: restore it with `mlflow experiments restore -x {found.experiment_id}`, "
                "or set tracking.experiment"
            )
        if found:
            return str(found.experiment_id)
        # A server places artifacts itself; sqlite would put them into the current directory.
        place = (beside / "mlartifacts").absolute().as_uri() if uri.startswith(SQLITE) else None
        return str(client.create_experiment(name, artifact_location=place))


def log_report(
    uri: str | None, experiment: str, folder: Path, params: dict[str, Any], metrics: dict[str, float]
) -> str:
    """Log a benchmark or comparison as a run of its own, with the files of its folder. Returns the URI of the store."""
    uri = tracking_uri(uri, folder.parent)
    client = mlflow_client(uri)
    place = open_experiment(client, uri, experiment, folder.parent)
    run = client.create_run(place, run_name=folder.name, tags=source_tags()).info.run_id
    _log_values(client, run, list(params.items()), metrics)
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        client.log_artifact(run, str(file))
    client.set_terminated(run)
    return uri


def source_tags() -> dict[str, str]:
    """What MLflow shows as user, source and commit of a run: the script of this process, and the commit of this project."""
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.git_utils import get_git_commit
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

    commit = get_git_commit(str(Path(__file__).parent))
    return {**resolve_tags(), **({MLFLOW_GIT_COMMIT: commit} if commit else {})}


def log_params(client: Any, run: str, params: Sequence[tuple[str, Any]]) -> None:
    """Log parameters in batches that MLflow takes. A value that is too long for it is cut, and its end says so."""
    from mlflow.entities import Param
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

    def text(value: Any) -> str:
        whole = str(value)
        end = f"… (cut; it has {len(whole)} characters)"
        return whole if len(whole) <= MAX_PARAM_VAL_LENGTH else whole[: MAX_PARAM_VAL_LENGTH - len(end)] + end

    values = [Param(name, text(value)) for name, value in params]
    for start in range(0, len(values), MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run, params=values[start : start + MAX_PARAMS_TAGS_PER_BATCH])


def _log_values(client: Any, run: str, params: list[tuple[str, Any]], metrics: dict[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    log_params(client, run, params)
    values = [Metric(name, value, now, 0) for name, value in metrics.items()]
    for start in range(0, len(values), 500):
        client.log_batch(run, metrics=values[start : start + 500])


def _numbers(tree: Any, name: str = "eval") -> dict[str, float]:
    """The numbers of nested dictionaries and lists by path; of a figure with an interval its value, lo and hi."""
    if isinstance(tree, dict):
        parts = [(f"{name}/{key}" if key != "value" else name, item) for key, item in tree.items()]
    elif isinstance(tree, list):
        parts = [(f"{name}_{j + 1}", item) for j, item in enumerate(tree)]
    else:
        plain = isinstance(tree, int | float) and not isinstance(tree, bool)
        return {re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name): float(tree)} if plain else {}
    return {path: number for part, item in parts for path, number in _numbers(item, part).items()}
