"""Where a replica's models come from."""

import asyncio
import json
import shutil

import httpx
import pytest

from kforcing import PushForwardLM
from kforcing.remote import local
from pipelines.storage import push
from serve.app import build
from serve.engine_thread import EngineThread
from serve.metrics import Metrics
from serve.models import default_name, fetch_models, load_models, pinned, resolve
from serve.settings import Settings
from tests.endpoint import complete, endpoint, save_model
from tests.models import make_backbone

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """models:/kforcing-quickstart@k4 in a registry of its own, registered as the pipeline registers students."""
    from mlflow import MlflowClient

    from pipelines.tracking.registry import model_files

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    run = client.create_run(client.create_experiment("e", (folder / "artifacts").as_uri())).info
    for file in model_files(save_model(folder / "student")):
        client.log_artifact(run.run_id, str(file), "model")
    client.create_registered_model("kforcing-quickstart")
    version = client.create_model_version("kforcing-quickstart", f"{run.artifact_uri}/model", run_id=run.run_id)
    client.set_registered_model_alias("kforcing-quickstart", "k4", version.version)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield


def test_a_registered_model_is_found_by_its_alias_and_served(registered):
    assert pinned("models:/kforcing-quickstart@k4") == "models:/kforcing-quickstart/1"
    found = resolve("models:/kforcing-quickstart@k4")
    with endpoint(found, max_model_len=40) as (_, service):
        assert set(service.models) == {"tiny", "teacher"}
    assert default_name("models:/kforcing-quickstart@k4") == "kforcing-quickstart"


def test_a_registered_model_is_downloaded_before_the_former_one_is_drained(registered, tmp_path, monkeypatch):
    with endpoint(save_model(tmp_path / "old"), max_model_len=40, load_after_drain=True) as (_, service):
        former, fetched = dict(service.models), []

        def fetch(settings):
            fetched.append(fetch_models(settings))
            assert service.models == former
            assert not any(model.async_engine.done for model in former.values())
            return fetched[0]

        monkeypatch.setattr("serve.service.fetch_models", fetch)
        settings = service.settings.model_copy(update={"model": "models:/kforcing-quickstart@k4"})
        asyncio.run(service.configure(settings))
        assert service.failed_deployment is None
        assert not set(service.models.values()) & set(former.values())
        assert (service.settings, service._folders) == (settings, fetched[0])
        assert (fetched[0]["model"] / "config.json").exists()


def test_a_missing_directory_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        resolve(str(tmp_path / "nothing"))


def test_a_model_in_object_storage_is_served_and_its_weights_are_fetched_once(store, tmp_path):
    uri, faults = store
    saved = save_model(tmp_path / "student")
    shutil.copytree(saved, local(f"{uri}/k4"))
    push(local(f"{uri}/k4"))
    shutil.rmtree(local(f"{uri}/k4"))
    faults.fail_every(10)
    settings = {"model": f"{uri}/k4", "max_model_len": 40}
    build(settings)
    answers = []
    for model in (f"{uri}/k4", saved):
        with endpoint(model, max_model_len=40) as (url, _), httpx.Client(base_url=url, timeout=30) as http:
            answers.append(complete(http)["choices"])
    assert answers[0] == answers[1]
    assert default_name(f"{uri}/k4") == "k4"
    with pytest.raises(FileNotFoundError, match=f"model={uri}/nothing holds no config.json"):
        resolve(f"{uri}/nothing")


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
        given = Settings(model=str(folder), max_model_len=40, **settings)
        return load_models(given, fetch_models(given), Metrics(), "test", thread)
    finally:
        thread.close()


def broken(folder, **settings):
    return {"model": str(folder), "max_model_len": 40, **settings}


def test_build_refuses_what_no_replica_could_serve(tmp_path):
    """Serve then keeps what it has."""
    good = save_model(tmp_path / "good")
    argmax = save_model(tmp_path / "argmax", PushForwardLM.from_backbone(make_backbone(), 4))
    cut, empty, words = (shutil.copytree(good, tmp_path / name) for name in ("cut", "empty", "words"))
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (empty / "model.safetensors").unlink()
    for file in words.glob("tokenizer*"):
        file.unlink()
    for given, kind, message in (
        (broken(tmp_path / "none"), FileNotFoundError, "model=.*none: there is no such directory"),
        (broken(good, teacher=str(tmp_path / "none")), FileNotFoundError, "teacher=.*none: there is no such"),
        (broken(tmp_path), FileNotFoundError, "no config.json in"),
        (broken(empty), FileNotFoundError, "no weights in .*empty"),
        (broken(words), FileNotFoundError, "no tokenizer in .*words"),
        (broken(cut), ValueError, "model.safetensors is damaged"),
        (broken(good, k=9), ValueError, "k=9 tokens a step asked where 1 to 4 can be made"),
        (broken(good, max_model_len=1000), ValueError, "max_model_len=1000"),
        (broken(good, coupling="x"), ValueError, "coupling=x"),
        (broken(argmax, acceptance="exact"), ValueError, "acceptance=exact needs the AR model"),
        (broken(good, name="teacher"), ValueError, "name=teacher"),
    ):
        with pytest.raises(kind, match=message):
            build(given)
    build(broken(good))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_build_accepts_a_plain_ar_model_as_model_and_as_teacher_and_refuses_another(tmp_path, family):
    plain, good = save_model(tmp_path / "plain", make_backbone(family)), save_model(tmp_path / "good")
    build(broken(plain))
    build(broken(good, teacher=str(plain)))
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": 50.0}))
    with pytest.raises(ValueError, match=r"teacher=.*plain: this model cannot be served: .*soft-capped"):
        build(broken(good, teacher=str(plain)))
