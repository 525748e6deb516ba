"""MLflow behind a gateway that fails, a deleted experiment, old servers, and runs with much to say."""

import json
import subprocess

import pytest
from mlflow import MlflowClient

from kforcing import PushForwardLM
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve, teacher_spec
from pipelines.tracking import pipeline_runs
from pipelines.tracking.mlflow_client import log_report, mlflow_client, tracking_uri
from pipelines.tracking.pipeline_runs import made_by
from pipelines.tracking.registry import registered_student
from tests.endpoint import save_model
from tests.infra.manifests import ROOT
from tests.models import make_backbone
from tests.pipelines.tracking.proxy import proxy_before
from tests.pipelines.tracking.runs import PARAMS, RECORD, tracker_for

pytestmark = pytest.mark.cluster
SECRET = "hunter" + "2" * 6


@pytest.fixture
def student(tmp_path):
    return save_model(tmp_path / "student", PushForwardLM.from_backbone(make_backbone(), k=2))


def whole_run(tmp_path, uri, prepared, student):
    """A tracked run of one stage that registers a student."""
    config, tracker = tracker_for(tmp_path, uri, [RECORD])
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.register(student, 2, "f00")
    tracker.artifact(config.root / "config.yaml")
    tracker.finish("FINISHED")
    return config, tracker


def is_complete(config, tracker):
    """Check that MLflow has the status, the files and the registered student of `whole_run`. Returns a client."""
    client = MlflowClient(tracker.mlflow.uri, registry_uri=tracker.mlflow.uri)
    parent, child = tracker.mlflow.parent, tracker.mlflow.children["k2-f00"]
    assert [client.get_run(run).info.status for run in (parent, child)] == ["FINISHED", "FINISHED"]
    assert [file.path for file in client.list_artifacts(parent)] == ["config.yaml"]
    version = client.get_model_version_by_alias("kforcing-smoke", "k2")
    assert version.run_id == child
    folder = config.root.parent / f"downloaded-{version.version}"
    registered_student("models:/kforcing-smoke@k2", tracker.mlflow.uri).download(folder)
    assert PushForwardLM.from_pretrained(folder).k == 2
    assert json.loads((config.root / "mlflow.json").read_text())["owed"] == []
    return client


def test_a_gateway_that_answers_503_and_504_to_large_files_has_everything_in_the_end(
    server, tmp_path, prepared, student, monkeypatch
):
    monkeypatch.setattr(pipeline_runs, "WAITS_S", (0.1, 0.1, 0.1, 0.1))
    failures = [503, 504, 503]

    def refuse(method, path, length):
        return failures.pop() if failures and method == "PUT" and length > 10_000 else None

    with proxy_before(server[0]) as (uri, gateway):
        gateway.refuse = staticmethod(refuse)
        config, tracker = whole_run(tmp_path, uri, prepared, student)
        assert failures == []
        client = is_complete(config, tracker)
        # Such a run fills the columns of MLflow's own.
        state = json.loads((config.root / "mlflow.json").read_text())
        (model,) = client.search_logged_models([state["experiment"]])
        child = client.get_run(tracker.mlflow.children["k2-f00"])
        assert (model.name, model.status.value, model.source_run_id) == ("k2", "READY", child.info.run_id)
        assert [output.model_id for output in child.outputs.model_outputs] == [model.model_id]


def test_a_gateway_that_takes_no_large_file_for_a_whole_run_has_it_after_the_next_start(
    server, tmp_path, prepared, student, caplog, monkeypatch
):
    monkeypatch.setattr(pipeline_runs, "WAITS_S", (0.1, 0.1))
    with proxy_before(server[0]) as (uri, gateway):
        gateway.refuse = staticmethod(lambda method, path, length: 503 if length > 10_000 else None)
        config, _ = whole_run(tmp_path, uri, prepared, student)
        assert "has not received: model of k2" in caplog.text
        gateway.refuse = staticmethod(lambda *_: None)
        _, again = tracker_for(tmp_path, uri)
        again.begin(prepared)
        again.finish("FINISHED")
        is_complete(config, again)


def test_a_server_without_logged_models_keeps_the_student_with_its_run(server, tmp_path, prepared, student):
    """As MLflow 2 answers."""
    with proxy_before(server[0]) as (uri, gateway):
        gateway.refuse = staticmethod(lambda method, path, _: 404 if "/logged-models" in path else None)
        config, tracker = whole_run(tmp_path, uri, prepared, student)
        gateway.refuse = staticmethod(lambda *_: None)  # MLflow 3's client lists no files without logged models
        client = is_complete(config, tracker)
        files = [file.path for file in client.list_artifacts(tracker.mlflow.children["k2-f00"], "model")]
        assert {"model/MLmodel", "model/config.json"} <= set(files)


def test_a_deleted_experiment_is_named_and_has_the_run_once_it_is_restored(tmp_path, prepared, student, caplog):
    uri = f"sqlite:///{tmp_path}/one.db"
    client = mlflow_client(uri)
    number = client.create_experiment("kforcing", artifact_location=(tmp_path / "artifacts").as_uri())
    client.delete_experiment(number)
    config, _ = whole_run(tmp_path, uri, prepared, student)
    assert f"experiment 'kforcing' is deleted: restore it with `mlflow experiments restore -x {number}`" in caplog.text
    assert "has not received: status of k2" in caplog.text
    client.restore_experiment(number)
    _, again = tracker_for(tmp_path, uri)
    again.begin(prepared)
    again.register(student, 2, "f00")
    again.finish("FINISHED")
    is_complete(config, again)


def test_an_experiment_that_is_deleted_in_the_middle_has_everything_once_it_is_restored(
    tmp_path, prepared, student, caplog, monkeypatch
):
    monkeypatch.setattr(pipeline_runs, "WAITS_S", (0.1,))
    uri = f"sqlite:///{tmp_path}/one.db"
    config, tracker = tracker_for(tmp_path, uri, [RECORD])
    tracker.begin(prepared)
    client = mlflow_client(uri)
    number = client.get_experiment_by_name("kforcing").experiment_id
    with tracker.stage("k2", "f00", PARAMS):
        client.delete_experiment(number)
    tracker.register(student, 2, "f00")
    tracker.finish("FINISHED")
    assert "has not received: status of k2, model of k2, status of the run" in caplog.text
    client.restore_experiment(number)
    _, again = tracker_for(tmp_path, uri)
    again.begin(prepared)
    again.finish("FINISHED")
    is_complete(config, again)


def test_files_that_an_earlier_release_left_with_the_run_are_not_taken_for_those_of_a_logged_model(
    tmp_path, prepared, student
):
    uri = f"sqlite:///{tmp_path}/one.db"
    config, _ = whole_run(tmp_path, uri, prepared, student)
    file = config.root / "mlflow.json"
    state = json.loads(file.read_text())
    earlier = {"models": {}, "registered": {}, "uploaded": {"f00": state["children"]["k2-f00"]}}
    file.write_text(json.dumps(state | earlier))
    _, again = tracker_for(tmp_path, uri)
    again.begin(prepared)
    again.register(student, 2, "f00")
    again.finish("FINISHED")
    is_complete(config, again)


def test_a_run_in_a_folder_with_blanks_and_percent_signs_is_complete(tmp_path, prepared, student):
    folder = tmp_path / "100% a%41b#"
    folder.mkdir()
    config, tracker = whole_run(folder, tracking_uri(None, folder), prepared, student)
    is_complete(config, tracker)


def test_hundreds_of_parameters_and_values_of_thousands_of_characters_arrive(tmp_path, prepared):
    uri = f"sqlite:///{tmp_path}/one.db"
    _, tracker = tracker_for(tmp_path, uri)
    params = {**{f"p{i}": i for i in range(250)}, "long": "x" * 5000, "longer": "y" * 9000}
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", params):
        pass
    tracker.finish("FINISHED")
    client = mlflow_client(uri)
    found = client.get_run(tracker.mlflow.children["k2-f00"]).data.params
    assert len(found) == 252
    assert (found["p249"], found["long"]) == ("249", "x" * 5000)
    assert found["longer"].endswith("y… (cut; it has 9000 characters)")
    assert len(found["longer"]) == 6000
    folder = tmp_path / "bench"
    folder.mkdir()
    log_report(uri, "benchmarks", folder, params, {"tokens_per_s": 1.0})
    (run,) = client.search_runs([client.get_experiment_by_name("benchmarks").experiment_id])
    assert len(run.data.params) == 252


def test_every_run_names_its_source_and_its_commit(tmp_path, prepared):
    _, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/one.db")
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.finish("FINISHED")
    client = mlflow_client(tracker.mlflow.uri)
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for run in (tracker.mlflow.parent, tracker.mlflow.children["k2-f00"]):
        tags = client.get_run(run).data.tags
        assert tags["mlflow.source.name"].rpartition("/")[2] in ("pytest", "__main__.py", "-c")
        assert tags["mlflow.source.type"] == "LOCAL"
        assert tags["mlflow.source.git.commit"] == commit


def test_a_stage_that_trains_nothing_shows_no_parameters_of_training():
    config = apply(recipe("smoke"), {}, ["teacher.path=given"])
    assert teacher_spec(config).params() == {"k": 0, "path": "given", "gguf_file": None}
    first, second, _ = (spec.params() for spec in resolve(config))
    assert set(first) == {"k", "design"}
    assert {"train", "rollout", "targets", "loss"} <= set(second)
    text = apply(recipe("smoke"), {}, ["targets=text", "loss=kl"])
    (stage,) = resolve(text)
    assert stage.params()["rollout"] == {"windows": stage.rollout.windows}


def test_a_password_in_the_environment_is_in_no_file_of_a_run(tmp_path, prepared, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, tracker = tracker_for(tmp_path, "none", [RECORD])
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.finish("FINISHED")
    assert tracker.mlflow.uri == f"http://me:{SECRET}@127.0.0.1:9"
    files = [file for file in config.root.rglob("*") if file.is_file()]
    assert {"log.jsonl", "config.yaml", "mlflow.json"} <= {file.name for file in files}
    assert [file for file in files if SECRET in file.read_text()] == []
    assert "has not received: status of k2" in caplog.text
    assert SECRET not in caplog.text
    assert made_by(config.root)["uri"] == tracker.mlflow.uri  # an evaluation finds the server again
