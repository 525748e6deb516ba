"""Registered students in the MLflow model registry."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from kforcing.model_uri import parse_model_uri, refuse_links
from pipelines.config.section import ConfigError
from pipelines.log import without_passwords
from pipelines.tracking.mlflow_client import mlflow_client, tracking_uri


@dataclass(frozen=True)
class Registered:
    """A version of a registered student, and the run that made it."""

    name: str
    version: str
    source: str
    uri: str
    run: str
    """Id of the pipeline's run."""
    params: dict[str, str]
    """The config of that run, field by field, as text; `mlflow_client.log_params` has cut very long values."""

    def run_file(self, name: str, folder: Path) -> Path | None:
        """A file of the pipeline's run, copied to a folder; None where the run has no such file."""
        client = mlflow_client(self.uri)
        if name not in [file.path for file in client.list_artifacts(self.run)]:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(self.run, name, str(folder)))

    def download(self, folder: Path) -> None:
        """Copy the model's files to a new folder."""
        from mlflow.artifacts import download_artifacts

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as empty:  # what an interrupted copy left is not mixed in
            place = Path(download_artifacts(artifact_uri=self.source, dst_path=empty, tracking_uri=self.uri))
            try:
                refuse_links(place)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            place.rename(folder)


def registered_student(name: str, uri: str | None) -> Registered:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry. Raises ConfigError when it is not there."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    uri = tracking_uri(uri, Path("runs"))
    try:
        model, alias, number = parse_model_uri(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    client = mlflow_client(uri)
    try:
        version = client.get_model_version_by_alias(model, alias) if alias else client.get_model_version(model, number)
        child = client.get_run(version.run_id)
        parent = client.get_run(child.data.tags.get(MLFLOW_PARENT_RUN_ID, version.run_id))
    except MlflowException as error:
        raise ConfigError(without_passwords(f"{name} in {uri}: {str(error).splitlines()[0]}")) from None
    return Registered(model, version.version, version.source, uri, parent.info.run_id, dict(parent.data.params))


def model_files(folder: Path) -> list[Path]:
    """The files of a saved model in a stage's folder: weights, configs and tokenizer, not its working files."""
    names = (
        "config.json",
        "generation_config.json",
        "conventions.json",
        "model*.safetensors*",
        "tokenizer*",
        "special_tokens_map.json",
        "vocab*",
        "added_tokens.json",
        "chat_template*",
        "merges*",
    )
    return sorted({f for pattern in names for f in folder.glob(pattern)})
