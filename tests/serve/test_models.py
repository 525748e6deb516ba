"""Where a replica's models come from."""

import pytest

from serve.models import default_name, pinned, resolve
from serve.settings import read_settings
from tests.endpoint import endpoint, save_model


def test_a_registered_model_is_found_by_its_alias_and_served(tmp_path, monkeypatch):
    """Registered as the pipeline registers students."""
    from mlflow import MlflowClient

    from pipelines.tracking.registry import model_files

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri, registry_uri=uri)
    run = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri())).info
    for file in model_files(save_model(tmp_path / "student")):
        client.log_artifact(run.run_id, str(file), "model")
    client.create_registered_model("kforcing-quickstart")
    version = client.create_model_version("kforcing-quickstart", f"{run.artifact_uri}/model", run_id=run.run_id)
    client.set_registered_model_alias("kforcing-quickstart", "k4", version.version)
    assert pinned("models:/kforcing-quickstart@k4") == "models:/kforcing-quickstart/1"
    found = resolve("models:/kforcing-quickstart@k4")
    with endpoint(found, max_model_len=40) as (_, service):
        assert set(service.models) == {"tiny", "teacher"}
    assert default_name("models:/kforcing-quickstart@k4") == "kforcing-quickstart"


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        resolve(str(tmp_path / "nothing"))


def test_settings_come_as_text_and_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k4").mkdir()
    settings = read_settings({"model": "k4", "max_num_seqs": "8", "batch_invariant": "true", "teacher": "none"})
    assert (settings.model, settings.max_num_seqs, settings.batch_invariant) == (str(tmp_path / "k4"), 8, True)
