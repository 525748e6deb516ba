"""MLflow for real: a server over HTTP, one that dies, one that never was."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from kforcing import LLM, PushForwardLM, SamplingParams
from pipelines.log import log
from pipelines.runs.stages import locked, run_id
from pipelines.tracking.mlflow_client import mlflow_client, open_experiment, tracking_uri
from pipelines.tracking.tracker import flatten, progress_line
from tests.endpoint import save_model
from tests.models import make_backbone
from tests.pipelines.tracking.runs import PARAMS, RECORD, kill, log_lines, start_server, tracker_for

pytestmark = pytest.mark.cluster


def test_the_progress_line_is_pinned():
    assert progress_line(RECORD) == (
        "k2       step 20/100  loss 2.500  match 0.50 0.25  1,234 tokens/s  data wait 3%  ETA 2:05"
    )


def test_records_flatten_to_the_same_keys_for_every_stage():
    flat = flatten(RECORD)
    assert flat["train/match_2"] == 0.25
    assert flat["train/nll_1"] == 2.0
    assert flat["tokens_seen"] == 1280
    assert "train/stage" not in flat
    assert "train/step" not in flat


def test_a_server_holds_runs_inputs_and_registered_students(server, tmp_path, prepared, monkeypatch):
    uri, _ = server
    _, tracker = tracker_for(tmp_path, uri, [RECORD])
    student = save_model(tmp_path / "student", PushForwardLM.from_backbone(make_backbone(), k=2))
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        tracker.register(student, 2, "f00")
    tracker.finish("FINISHED")
    client = MlflowClient(uri)
    child = client.get_run(tracker.mlflow.children["k2-f00"])
    assert child.data.metrics["train/match_2"] == 0.25
    assert child.data.params["k"] == "2"
    assert child.data.params["train.lr"] == "0.002"
    assert [file.path for file in client.list_artifacts(tracker.mlflow.parent)] == ["config.yaml"]
    assert {d.dataset.name for d in child.inputs.dataset_inputs} == {"sotu:train", "sotu:heldout"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    local = download_artifacts("models:/kforcing-smoke@k2", dst_path=str(tmp_path / "downloaded"))
    assert PushForwardLM.from_pretrained(Path(local)).k == 2
    assert (Path(local) / "MLmodel").is_file()
    model = mlflow.pyfunc.load_model("models:/kforcing-smoke@k2")
    (answer,) = LLM(student).generate("abc", SamplingParams(max_tokens=9, seed=3))
    assert model.predict(["abc"], params={"max_new_tokens": 9, "seed": 3}) == [answer.outputs[0].text]
    # The same run directory continues the same runs.
    _, again = tracker_for(tmp_path, uri)
    again.begin(prepared)
    with again.stage("k2", "f00", PARAMS):
        pass
    assert again.mlflow.parent == tracker.mlflow.parent
    assert again.mlflow.children == tracker.mlflow.children


def test_a_server_that_dies_costs_one_warning_and_no_record(server, tmp_path, prepared, caplog):
    uri, process = server
    config, tracker = tracker_for(tmp_path, uri)
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        kill(process)
        tracker.drain.records = [RECORD, {**RECORD, "step": 40}]
    tracker.finish("FINISHED")
    assert caplog.text.count("training goes on") == 1
    assert [r["step"] for r in log_lines(config) if r.get("event") == "train"] == [20, 40]


def test_an_unreachable_server_costs_one_warning_and_no_record(tmp_path, prepared, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, tracker = tracker_for(tmp_path, "http://127.0.0.1:9", [RECORD])
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.finish("FINISHED")
    assert caplog.text.count("tracking to http://127.0.0.1:9 failed, training goes on") == 1
    assert [r["event"] for r in log_lines(config)].count("train") == 1


def test_a_store_that_forgot_the_run_gets_a_new_one(tmp_path, prepared, caplog):
    uri = f"sqlite:///{tmp_path}/one.db"
    _, tracker = tracker_for(tmp_path, uri)
    tracker.begin(prepared)
    first = tracker.mlflow.parent
    (tmp_path / "one.db").rename(tmp_path / "moved.db")
    config, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/./one.db")
    state = config.root / "mlflow.json"
    state.write_text(state.read_text().replace(uri, tracker.mlflow.uri))
    tracker.begin(prepared)
    assert tracker.mlflow.parent not in (None, first)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("text", ["", '{"uri": "sqli'])
def test_a_cut_record_of_runs_is_named_once_and_made_again(tmp_path, prepared, caplog, text):
    config, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/one.db")
    tracker.begin(prepared)
    (config.root / "mlflow.json").write_text(text)
    _, again = tracker_for(tmp_path, tracker.mlflow.uri)
    again.begin(prepared)
    with again.stage("k2", "f00", PARAMS):
        pass
    again.finish("FINISHED")
    state = json.loads((config.root / "mlflow.json").read_text())
    client = MlflowClient(again.mlflow.uri)
    for run in (state["parent"], state["children"]["k2-f00"]):
        assert client.get_run(run).info.status == "FINISHED"
    (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert line.startswith(f"{config.root}/mlflow.json is empty or cut")


def test_tracking_can_be_off(tmp_path, prepared, caplog):
    _, tracker = tracker_for(tmp_path, "off", [RECORD])
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.finish("FINISHED")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_every_record_carries_the_run_and_its_stage_and_lines_are_records_too(tmp_path, prepared):
    root = tmp_path / "runs" / "a"
    with locked(root, "smoke"):
        name = run_id(root)
    assert re.fullmatch(r"a-[0-9a-f]{6}", name)
    with locked(root, "smoke"):  # the next start keeps it
        assert run_id(root) == name
    config, tracker = tracker_for(tmp_path, "off", [RECORD])
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        log.warning("the disk is slow")
    tracker.finish("FAILED", "the disk is full")
    records = log_lines(config)
    assert {record["run"] for record in records} == {name}
    stages = {record["event"]: record.get("stage") for record in records}
    assert stages == {
        "config": None, "stage_started": "k2", "line": "k2", "train": "k2", "stage_ended": "k2", "run_ended": None,
    }  # fmt: skip
    (line,) = (record for record in records if record["event"] == "line")
    assert (line["level"], line["text"]) == ("warning", "the disk is slow")
    assert records[-1]["error"] == "the disk is full"
    log.warning("after the run")
    assert log_lines(config) == records


def test_a_log_that_cannot_be_written_costs_one_warning_and_no_run(tmp_path, prepared, caplog):
    config, tracker = tracker_for(tmp_path, "off")
    tracker.begin(prepared)
    file, kept = config.root / "log.jsonl", config.root / "kept"
    file.rename(kept)
    file.symlink_to("/dev/full")
    with tracker.stage("k2", "f00", PARAMS):
        pass
    file.unlink()
    kept.rename(file)
    with open(file, "a") as cut:
        cut.write('{"time": 1')  # what a full disk takes of a line
    tracker.finish("FINISHED")
    assert (
        caplog.text.count(
            "log.jsonl cannot be written (No space left on device); records are missing from it until it can be"
        )
        == 1
    )
    assert json.loads(file.read_text().splitlines()[-1])["event"] == "run_ended"


def test_a_server_that_was_away_when_a_stage_ended_has_everything_in_the_end(server, tmp_path, prepared):
    uri, process = server
    config, tracker = tracker_for(tmp_path, uri)
    student = save_model(tmp_path / "student", PushForwardLM.from_backbone(make_backbone(), k=2))
    report = tmp_path / "report.md"
    report.write_text("report")
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        kill(process)
    tracker.register(student, 2, "f00")
    tracker.artifact(report)
    again = start_server(tmp_path, int(uri.rpartition(":")[2]))
    try:
        tracker.finish("FINISHED")
        client = MlflowClient(uri)
        for run in (tracker.mlflow.parent, tracker.mlflow.children["k2-f00"]):
            assert client.get_run(run).info.status == "FINISHED"
        version = client.get_model_version_by_alias("kforcing-smoke", "k2")
        assert version.run_id == tracker.mlflow.children["k2-f00"]
        assert "report.md" in [file.path for file in client.list_artifacts(tracker.mlflow.parent)]
        assert json.loads((config.root / "mlflow.json").read_text())["owed"] == []
    finally:
        kill(again)


def test_what_a_store_did_not_take_is_named_and_given_to_it_at_the_next_start(tmp_path, prepared, caplog):
    config, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/later/one.db")
    (tmp_path / "later").write_text("a file in the way of the store's folder")
    tracker.begin(prepared)
    with tracker.stage("k2", "f00", PARAMS):
        pass
    tracker.finish("FINISHED")
    assert "has not received: status of k2, status of the run. The next start of this run tries again" in caplog.text
    (tmp_path / "later").unlink()
    _, again = tracker_for(tmp_path, tracker.mlflow.uri)
    again.begin(prepared)
    client = MlflowClient(tracker.mlflow.uri)
    assert client.get_run(again.mlflow.children["k2-f00"]).info.status == "FINISHED"
    assert json.loads((config.root / "mlflow.json").read_text())["owed"] == []


def test_what_a_store_refuses_is_named_and_holds_nothing_else_up(tmp_path, prepared, caplog):
    config, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/one.db")
    runs = tracker.mlflow
    runs.run = dataclasses.replace(runs.run, tracking=dataclasses.replace(runs.run.tracking, model_name="a/b"))
    student = save_model(tmp_path / "student", PushForwardLM.from_backbone(make_backbone(), k=2))
    client = MlflowClient(runs.uri, registry_uri=runs.uri)
    tracker.begin(prepared)
    for name in ("k1", "k2"):
        with tracker.stage(name, "f00", PARAMS):
            if name == "k1":
                client.delete_run(runs.children["k1-f00"])
    tracker.register(student, 2, "f00")
    tracker.finish("FINISHED")
    child = runs.children["k2-f00"]
    assert [client.get_run(run).info.status for run in (runs.parent, child)] == ["FINISHED", "FINISHED"]
    assert caplog.text.count("refuses the status of k1") == 1
    assert caplog.text.count("refuses the model of k2") == 1
    assert "has not received: status of k1, model of k2. The next start" in caplog.text
    assert client.list_artifacts(child) == []  # a refused model is not uploaded
    # The next start tries again; files that MLflow has are not sent twice.
    _, again = tracker_for(tmp_path, runs.uri)
    again.begin(prepared)
    state = json.loads((config.root / "mlflow.json").read_text())
    assert (state["uploaded"], state["registered"]) == ({"f00": state["models"][child]}, {"f00": 1})
    (student / "merges.txt").write_text("a file that a second upload would take along")
    (config.root / "mlflow.json").write_text(json.dumps({**state, "registered": {}}))
    again.register(student, 2, "f00")
    assert client.get_model_version_by_alias("kforcing-smoke", "k2").version == 2
    (logged,) = client.search_logged_models([state["experiment"]])
    files = [file.path for file in client.list_logged_model_artifacts(logged.model_id)]
    assert "config.json" in files
    assert "merges.txt" not in files


def test_two_threads_lose_nothing_of_what_is_owed(tmp_path, prepared):
    _, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/later/one.db")
    (tmp_path / "later").write_text("a file in the way of the store's folder")
    tracker.begin(prepared)
    files = [[tmp_path / f"{thread}-{number}" for number in range(20)] for thread in range(2)]
    threads = [threading.Thread(target=lambda own=own: [tracker.artifact(file) for file in own]) for own in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owed = json.loads((tmp_path / "runs" / "a" / "mlflow.json").read_text())["owed"]
    assert {debt["value"] for debt in owed} == {str(file) for own in files for file in own}


def test_a_run_that_ends_before_it_is_tracked_leaves_no_run(tmp_path, caplog):
    _, tracker = tracker_for(tmp_path, f"sqlite:///{tmp_path}/one.db")
    tracker.finish("FAILED")
    assert not (tmp_path / "one.db").exists()
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["100% a%41b#", "a?b"])
def test_a_local_store_may_lie_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    uri = tracking_uri(None, folder)
    client = mlflow_client(uri)
    run = client.create_run(open_experiment(client, uri, "x", folder)).info.run_id
    (tmp_path / "a.txt").write_text("a")
    client.log_artifact(run, str(tmp_path / "a.txt"))
    assert [file.path for file in client.list_artifacts(run)] == ["a.txt"]
    assert (folder / "mlflow.db").stat().st_size > 0


def test_two_runs_may_begin_on_one_new_store(tmp_path):
    """Their processes make its tables one after the other."""
    code = """
import sys
from pathlib import Path
from pipelines.tracking.mlflow_client import mlflow_client, open_experiment, tracking_uri
uri = tracking_uri(None, Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
client = mlflow_client(uri)
client.create_run(open_experiment(client, uri, "x", Path(sys.argv[1])))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    for run in runs:
        errors = run.communicate(timeout=300)[1]
        assert run.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("x").experiment_id])) == 2
