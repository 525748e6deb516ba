"""Copies of folders in object storage, against a real S3 server on loopback."""

import os
import re

import pytest

from kforcing import remote
from kforcing.remote import RemoteError, address, fetch, listing, local, open_uri, read_bytes, uri_of

pytestmark = pytest.mark.cluster


def put(uri, content=b"x"):
    system, path = open_uri(uri)
    with system.open_output_stream(path) as stream:
        stream.write(content)


def answers_with(status, monkeypatch, faults):
    """The server answers every request so, and nobody waits before trying again."""
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(remote, "SDK_ATTEMPTS", 1)
    remote._file_system.cache_clear()
    faults.status_of = lambda number, environ: status


@pytest.fixture(autouse=True)
def _fresh_file_systems():
    yield
    remote._file_system.cache_clear()


def test_a_uri_and_the_path_of_its_copy_determine_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for uri in ("s3://bucket/runs/a", "gs://bucket/a", "abfs://container@account.dfs.core.windows.net/a"):
        assert uri_of(local(uri)) == address(local(uri)) == uri
        assert local(uri).is_relative_to(tmp_path)
        assert uri_of(local(uri) / "k4" / "config.json") == f"{uri}/k4/config.json"
    assert local("s3://bucket//a/") == local("s3://bucket/a")


def test_paths_and_file_uris_are_paths():
    assert local("runs/a") == local("runs") / "a"
    assert str(local("file:///data/my%20runs")) == str(local("file://localhost/data/my%20runs")) == "/data/my runs"
    assert uri_of(local("/data/runs")) is None
    assert address("/data/runs") == "/data/runs"


def test_buckets_of_two_endpoints_have_two_copies(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    aws = local("s3://bucket/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert local("s3://bucket/a") != aws
    assert uri_of(local("s3://bucket/a")) == "s3://bucket/a"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/../other", "leads out of its folder"),
        ("s3://bucket/%2e%2e/other", "leads out of its folder"),
        ("s3:///runs", "write s3://BUCKET/PATH"),
        ("s3://bucket/a?endpoint_override=x", "write s3://BUCKET/PATH"),
        ("ftp://host/a", "ftp:// is not known"),
    ],
)
def test_a_uri_that_names_no_folder_is_refused(uri, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        local(uri)


@pytest.mark.parametrize(
    "uri",
    ["s3://KEY:SECRET@bucket/a", "abfs://:SECRET@account/c", "abfs://c@account/p?sig=SECRET", "x://u:SECRET@host/a"],
)
def test_a_key_in_a_uri_is_refused_and_not_shown(uri):
    with pytest.raises(ValueError, match=r"write|give a path") as error:
        local(uri)
    assert "SECRET" not in str(error.value)


def test_a_copy_becomes_what_the_uri_is(store):
    uri, _ = store
    for name in ("config.json", "deep/er/file", "train/shard.parquet", "lease/a.json"):
        put(f"{uri}/{name}", name.encode())
    folder = fetch(uri)
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == {
        "config.json",
        "deep/er/file",
    }
    (folder / "left.json").write_text("of a run that died")
    (folder / "deep" / "er" / "file").write_text("changed")
    put(f"{uri}/config.json", b"new")
    fetch(uri)
    assert not (folder / "left.json").exists()
    assert (folder / "config.json").read_bytes() == b"new"
    assert (folder / "deep" / "er" / "file").read_text() == "deep/er/file"
    assert read_bytes(folder / "config.json") == read_bytes(f"{uri}/config.json") == b"new"


def test_large_files_are_fetched_once_or_not_at_all(store):
    uri, faults = store
    weights = os.urandom(remote.SMALL)
    put(f"{uri}/model.safetensors", weights)
    assert not (fetch(uri, whole=False) / "model.safetensors").exists()
    assert (fetch(uri) / "model.safetensors").read_bytes() == weights
    faults.seen.clear()
    fetch(uri)
    assert not [path for method, path, _ in faults.seen if method == "GET" and path.endswith("model.safetensors")]
    put(f"{uri}/model.safetensors", b"y" * remote.SMALL + b"y")
    assert not (fetch(uri, whole=False) / "model.safetensors").exists(), "old weights must not stay"


def test_a_folder_is_fetched_from_a_server_that_fails_every_tenth_request(store):
    uri, faults = store
    contents = {f"{i}.bin": os.urandom(1000 + i) for i in range(40)}
    for name, content in contents.items():
        put(f"{uri}/{name}", content)
    faults.fail_every(10)
    before = faults.failed
    folder = fetch(uri)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == contents
    assert faults.failed > before + 3


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "the store refuses these credentials"),
        (401, "the store refuses these credentials"),
        (400, "the store cannot take this request"),
        (503, "the store does not answer as it should after 3 tries"),
    ],
)
def test_a_refusal_is_one_line_with_the_uri_and_what_to_do(status, words, store, monkeypatch):
    uri, faults = store
    answers_with(status, monkeypatch, faults)
    with pytest.raises(RemoteError) as error:
        listing(uri)
    assert str(error.value).startswith(f"{uri}: {words}")
    assert "\n" not in str(error.value)


def test_a_refusal_is_not_tried_again_and_a_server_error_is(store, monkeypatch):
    uri, faults = store
    for status, requests in ((403, 1), (503, 3)):
        answers_with(status, monkeypatch, faults)
        faults.seen.clear()
        with pytest.raises(RemoteError):
            listing(uri)
        assert len(faults.seen) == requests


def test_numbers_in_names_are_not_taken_for_a_status(store, monkeypatch):
    uri, faults = store
    answers_with(503, monkeypatch, faults)
    with pytest.raises(RemoteError, match="does not answer as it should"):
        listing(f"{uri}/exp-403")


def test_an_object_that_is_not_there_is_a_missing_file(store):
    uri, _ = store
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{uri}/nothing")
    assert listing(uri) == {}
