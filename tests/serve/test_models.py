"""Where a replica's models come from."""

import pytest

from serve.engine_thread import EngineThread
from serve.metrics import Metrics
from serve.models import default_name, load_models, pinned, resolve
from serve.settings import Settings
from tests.endpoint import endpoint, save_model

pytestmark = pytest.mark.cluster


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


def test_a_missing_directory_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        resolve(str(tmp_path / "nothing"))


@pytest.mark.parametrize("uri", ["models:/kforcing", "models:/kforcing@k4/2", "models:/kforcing/latest"])
def test_a_malformed_model_uri_is_refused_with_the_accepted_forms(uri):
    for function in (pinned, resolve, default_name):
        with pytest.raises(ValueError, match="write models:/NAME@ALIAS or models:/NAME/VERSION"):
            function(uri)


@pytest.mark.parametrize("settings", [{"name": "teacher"}, {"name": None}])
def test_a_student_named_teacher_is_refused_unless_it_is_served_alone(tmp_path, settings):
    """It would hide the AR model beside it, or be hidden by it; a folder gives its name to the model in it."""
    folder = save_model(tmp_path / "teacher")
    with pytest.raises(ValueError, match="name=teacher: the AR model beside the student has this name"):
        serve_alone(folder, **settings)
    assert list(serve_alone(folder, teacher="none", **settings)) == ["teacher"]


def serve_alone(folder, **settings):
    """The models of a replica, by name."""
    thread = EngineThread()
    try:
        return load_models(Settings(model=str(folder), max_model_len=40, **settings), Metrics(), "test", thread)
    finally:
        thread.close()
