import logging

import pytest

from pipelines.log import log, show_progress, without_passwords


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("open https://me:p@ss@host:5000/x", "open https://***@host:5000/x"),
        ("mysql+pymysql://u:p@h/a and s3://KEY:SECRET@b/c", "mysql+pymysql://***@h/a and s3://***@b/c"),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db"),
        ("https://host?mail=a@b", "https://host?mail=a@b"),
    ],
)
def test_a_uri_is_shown_without_user_and_password(text, shown):
    assert without_passwords(text) == shown
