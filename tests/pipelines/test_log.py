import json
import logging
import re

import pytest

from pipelines.log import belonging, ids, log, show_progress, without_passwords


@pytest.fixture(autouse=True)
def restore():
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


def test_progress_goes_to_stdout_as_it_is_and_warnings_to_stderr(capsys):
    show_progress()
    show_progress()  # a second call does not print lines twice
    logging.getLogger("kforcing").info("k2  finished before, skipped")
    log.warning("train.on_policy_fraction is now train.on_policy_fraction")
    out, err = capsys.readouterr()
    assert out == "k2  finished before, skipped\n"
    assert err == "warning  train.on_policy_fraction is now train.on_policy_fraction\n"


def test_lines_are_json_objects_with_ids_where_a_collector_wants_them(capsys, monkeypatch):
    monkeypatch.setenv("KFORCING_LOG", "json")
    monkeypatch.setitem(ids, "run", "toy-1a2b3c")
    monkeypatch.setitem(ids, "stage", "k2")
    show_progress()
    log.info("k2  training 8 steps")
    log.warning('a "warning"')
    out, err = (json.loads(line) for line in capsys.readouterr())
    assert (out["run"], out["stage"], out["level"], out["text"]) == ("toy-1a2b3c", "k2", "info", "k2  training 8 steps")
    assert (err["level"], err["text"]) == ("warning", 'a "warning"')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", out["time"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("open https://me:p@ss@host:5000/x", "open https://***@host:5000/x"),
        ("mysql+pymysql://u:p@h/a and s3://KEY:SECRET@b/c", "mysql+pymysql://***@h/a and s3://***@b/c"),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db"),
        ("https://host?mail=a@b", "https://host?mail=a@b"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("hdfs://me@host/a and hdfs://me:p@host/a", "hdfs://me@host/a and hdfs://***@host/a"),
        ("postgresql://host/db?user=me&password=p&x=1", "postgresql://host/db?user=me&password=***&x=1"),
    ],
)
def test_a_uri_is_shown_without_user_and_password(text, shown):
    assert without_passwords(text) == shown


def test_lines_of_an_evaluation_belong_to_its_run_and_to_one_part_at_a_time():
    with belonging(run="toy-1a2b3c"):
        with belonging(stage="speed"):
            assert ids == {"run": "toy-1a2b3c", "stage": "speed"}
        assert ids == {"run": "toy-1a2b3c"}
    assert ids == {}
