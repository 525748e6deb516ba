"""A student as a logged model of MLflow, which its table of models shows and its registered version names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kforcing.remote import fetch
from pipelines.tracking.flavour import write_flavour
from pipelines.tracking.registry import model_files


def logged_model(client: Any, run: str, name: str, tags: dict[str, str], known: str | None) -> Any:
    """The logged model of a run, made if it is not there; None on servers before MLflow 3, which have no logged models.

    Args:
        run: the run that made it.
        known: id of the logged model that an earlier call has made; another one is made if it has been deleted.
    """
    from mlflow.exceptions import MlflowException

    if known:
        try:
            return client.get_logged_model(known)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_run(run).info.experiment_id
    try:
        return client.create_logged_model(experiment, name=name, source_run_id=run, tags=tags)
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        return None


def upload(client: Any, run: str, folder: Path, model: Any) -> None:
    """Upload the files of a saved student and its flavour: to its logged model, or to `model` below the run without one.

    The logged model becomes one of the run's outputs.
    """
    from mlflow.entities import LoggedModelOutput

    with tempfile.TemporaryDirectory() as place:
        for file in model_files(fetch(folder)):
            Path(place, file.name).symlink_to(file.absolute())
        if model is None:
            write_flavour(Path(place), run, None)
            client.log_artifacts(run, place, "model")
        else:
            write_flavour(Path(place), run, model.model_id)
            client.log_model_artifacts(model.model_id, place)
            client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
            client.finalize_logged_model(model.model_id, "READY")
