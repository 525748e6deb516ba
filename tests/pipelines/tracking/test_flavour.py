"""Registered students as MLflow models: what `mlflow.pyfunc` loads continues text."""

from pathlib import Path

import mlflow
import pandas
import pytest
from mlflow import MlflowClient

from kforcing import PushForwardLM
from kforcing.engine import Engine, Request
from pipelines.tracking.flavour import write_flavour
from pipelines.tracking.registry import registered_student
from tests.endpoint import EOS, ids_of, save_model, text_of
from tests.models import make_backbone, make_sequential


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The URI of a student that was registered in a sqlite store."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri, registry_uri=uri)
    run = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri())).info
    student = save_model(tmp_path / "student")
    write_flavour(student, run.run_id, None)
    client.log_artifacts(run.run_id, str(student), "model")
    client.create_registered_model("tiny")
    version = client.create_model_version("tiny", f"{run.artifact_uri}/model", run_id=run.run_id)
    client.set_registered_model_alias("tiny", "k4", version.version)
    return "models:/tiny@k4"


def test_predict_returns_the_text_of_the_engine_under_the_same_seed(registered):
    model = mlflow.pyfunc.load_model(registered)
    engine = Engine(make_sequential(make_backbone()))
    prompts = ["abc", "cab"]
    for seed, k in ((1, 0), (2, 2)):
        requests = [Request(ids_of(p), 12, seed, frozenset([EOS]), k or None) for p in prompts]
        expected = [text_of(completion.tokens) for completion in engine.generate(requests)]
        params = {"max_new_tokens": 12, "seed": seed, "k": k}
        assert model.predict(prompts, params=params) == expected
        assert model.predict(pandas.DataFrame({"prompt": prompts}), params=params) == expected


def test_the_flavour_has_a_signature_and_requirements(registered):
    model = mlflow.pyfunc.load_model(registered)
    assert {p.name for p in model.metadata.signature.params} == {"max_new_tokens", "temperature", "seed", "k"}
    needed = Path(mlflow.pyfunc.get_model_dependencies(registered)).read_text()
    assert "torch==" in needed
    assert "transformers==" in needed


def test_the_folder_of_a_registered_student_still_loads_without_mlflow(registered, tmp_path):
    found = registered_student(registered, None)
    found.download(tmp_path / "copy")
    assert (tmp_path / "copy" / "MLmodel").is_file()
    assert PushForwardLM.from_pretrained(tmp_path / "copy").k == 4
