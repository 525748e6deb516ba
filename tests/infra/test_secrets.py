"""No file of the project holds a key, a token or a password."""

import re
import subprocess

import pytest

from tests.infra.manifests import ROOT

pytestmark = pytest.mark.cluster
LOOKS_LIKE = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "token of a code host": r"\b(?:ghp|gho|ghs|glpat|github_pat)[-_][0-9A-Za-z_-]{20,}",
    "token of a model hub": r"\bhf_[0-9A-Za-z]{30,}\b",
    "key of an API": r"\bsk-[0-9A-Za-z_-]{20,}",
    "password in a URI": r"\b[a-z][a-z0-9+]*://[\w.-]+:(?!(?i:password|secret)@)[^\s/@:'\"`{}*$]{6,}@",
}
MADE_UP = ROOT / "tests" / "pipelines" / "test_log.py"
"""Its passwords are those that a test hides."""


def found(text):
    """What a text holds that looks like a secret."""
    return [what for what, pattern in LOOKS_LIKE.items() if re.search(pattern, text)]


def test_no_tracked_file_holds_one():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert len(files) > 100
    texts = {file: file.read_bytes().decode(errors="ignore") for file in files if file.is_file() and file != MADE_UP}
    assert {str(file): what for file, text in texts.items() if (what := found(text))} == {}


@pytest.mark.parametrize(
    ("what", "planted"),
    [
        ("private key", "-----BEGIN " + "PRIVATE KEY-----"),
        ("key of AWS", "AKIA" + "Q7" * 8),
        ("token of a code host", "ghp_" + "a1" * 18),
        ("token of a model hub", "hf_" + "a1" * 17),
        ("key of an API", "sk-" + "a1" * 16),
        ("password in a URI", "postgresql://mlflow:" + "hunter2hunter2@db:5432/mlflow"),
    ],
)
def test_a_planted_one_is_found(what, planted):
    assert found(f"x = '{planted}'") == [what]


def test_the_placeholder_of_a_manifest_is_none():
    assert found("postgresql://mlflow:PASSWORD@mlflow-postgres:5432/mlflow") == []
