"""Run directories and caches in object storage, against a real S3 server on loopback."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from kforcing import remote
from kforcing.remote import RemoteError, fetch, listing, local, read_bytes
from pipelines import storage
from pipelines.config.section import ConfigError
from pipelines.data.rows import token_rows
from pipelines.data.token_store import TokenStore, is_complete, shard_entries, write_manifest, write_shard
from pipelines.failures import Exit, cause_of
from pipelines.files import added_files, atomic_folder, atomic_write, write_json
from pipelines.runs.stages import claim, locked, open_stage
from pipelines.storage import adopt, held, lease_of, move, probe, push, remove, remove_file, sizes
from tests.pipeline_runs import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
BUSY = "in use"
LIFE_S = 20.0
HOLD = """
import sys, time
from kforcing.remote import local
from pipelines.storage import held

with held(local(sys.argv[1]), "in use", life_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def driver(uri):
    """Another process that takes the lease of a URI."""
    line = [sys.executable, "-c", HOLD, uri, str(LIFE_S)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def fail_after_writing(file):
    file.write_text("half")
    raise RuntimeError


def test_what_gets_its_name_is_uploaded_and_what_fails_is_not(store):
    uri, _ = store
    folder = local(uri)
    folder.mkdir(parents=True)
    write_json(folder / "stage.json", {"a": 1})
    with atomic_folder(folder / "tokenizer") as partial:
        (partial / "tokenizer.json").write_text("{}")
    with pytest.raises(RuntimeError), atomic_folder(folder / "broken") as partial:
        fail_after_writing(partial / "half")
    assert sizes(folder).keys() == {"stage.json", "tokenizer/tokenizer.json"}
    assert read_bytes(f"{uri}/stage.json") == (folder / "stage.json").read_bytes()


def test_the_file_that_marks_a_model_is_uploaded_last(store):
    uri, faults = store
    folder = local(uri)
    folder.mkdir(parents=True)
    faults.seen.clear()
    with added_files(folder, last="config.json") as partial:
        for name in ("config.json", "a.safetensors", "z.json"):
            (partial / name).write_text(name)
    uploaded = [path.rpartition("/")[2] for method, path, _ in faults.seen if method == "PUT"]
    assert uploaded[-1] == "config.json"
    assert {*uploaded} == {"config.json", "a.safetensors", "z.json"}


def test_other_paths_are_left_alone(tmp_path):
    atomic_write(tmp_path / "a", "x")
    push(tmp_path / "a")
    probe(tmp_path)
    assert sizes(tmp_path) == {"a": 1}
    (tmp_path / "f").mkdir()
    move(tmp_path / "f", tmp_path / "g")
    remove(tmp_path / "g")
    remove_file(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_folders_move_and_go_in_the_uri_and_in_the_copy(store):
    uri, _ = store
    folder = local(uri)
    for name in ("stage.json", "deep/weights"):
        (folder / "k2" / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "k2" / name, name)
    (folder / "archive").mkdir()
    move(folder / "k2", folder / "archive" / "k2-old")
    assert sizes(folder).keys() == {"archive/k2-old/stage.json", "archive/k2-old/deep/weights"}
    assert (folder / "archive" / "k2-old" / "deep" / "weights").read_text() == "deep/weights"
    remove(folder / "archive")
    assert sizes(folder) == {}
    assert not (folder / "archive").exists()
    remove(folder / "archive")
    remove_file(folder / "nothing")


def test_a_stage_of_other_settings_comes_back_from_the_archive_of_the_uri(store, tmp_path, monkeypatch):
    uri, _ = store
    local(uri).mkdir(parents=True)
    write_json(open_stage(local(uri), "k2", "one").folder / "figures.json", [1])
    open_stage(local(uri), "k2", "two")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    stage = open_stage(fetch(uri), "k2", "one")
    assert (stage.folder / "figures.json").read_text() == "[\n  1\n]"
    assert {"k2/figures.json", "k2/stage.json", "archive/k2-two/stage.json"} == sizes(local(uri)).keys()


def test_a_stage_whose_move_to_the_archive_was_cut_comes_back_whole(store):
    uri, _ = store
    local(uri).mkdir(parents=True)
    write_json(open_stage(local(uri), "k2", "one").folder / "figures.json", [1])
    cut = local(uri) / "archive" / "k2-one"
    cut.mkdir(parents=True)
    atomic_write(cut / "weights", "of a move that was killed")
    open_stage(local(uri), "k2", "two")
    assert (open_stage(local(uri), "k2", "one").folder / "figures.json").exists()


def test_a_folder_is_removed_without_its_marks_first(store):
    uri, faults = store
    local(uri).mkdir(parents=True)
    for name in ("a.bin", "manifest.json", "z.bin"):
        atomic_write(local(uri) / name, name)
    faults.status_of = lambda number, environ: 403 if "delete" in environ["QUERY_STRING"] else None
    with pytest.raises(RemoteError):
        remove(local(uri))
    assert sizes(local(uri)).keys() == {"a.bin", "z.bin"}


def write_store(place):
    rng = np.random.default_rng(0)
    entries = []
    for i in range(3):
        tokens = rng.integers(0, 99, (150, 8)).astype(np.int32)
        rows = token_rows(np.arange(150) + 150 * i, np.arange(150), tokens)
        entries.append(write_shard(place, f"shard-{i}", rows))
    return entries


def test_a_store_is_read_from_the_uri_by_row_group(store, tmp_path):
    uri, faults = store
    entries = write_store(local(uri))
    assert not list(local(uri).glob("*.parquet")), "the nodes keep no shards"
    assert shard_entries(local(uri)) == entries == write_store(tmp_path)
    assert not is_complete(local(uri))
    for place in (local(uri), tmp_path):
        write_manifest(place, entries)
        assert is_complete(place)
    faults.fail_every(10)
    positions = np.random.default_rng(1).integers(0, 900, 64)
    faults.seen.clear()
    assert TokenStore(uri, 3).read(positions).equals(TokenStore(tmp_path, 3).read(positions))
    ranges = [where for _, path, where in faults.seen if path.endswith(".parquet") and where]
    assert ranges, "pieces of shards are asked for"
    remove_file(local(uri) / "shard-1.parquet")
    assert not is_complete(local(uri))


def test_the_probe_names_a_missing_bucket_and_refused_credentials(store, monkeypatch):
    uri, faults = store
    probe(local(uri))
    assert sizes(local(uri)) == {}
    with pytest.raises(RemoteError, match="there is no such bucket; make it, or correct the name") as error:
        probe(local("s3://nowhere/run"))
    assert str(error.value).startswith("s3://nowhere/run: ")
    assert cause_of(error.value).exit_code == Exit.STORAGE
    faults.status_of = lambda number, environ: 403
    with pytest.raises(RemoteError, match=f"{uri}: the store refuses these credentials"):
        probe(local(uri))


def test_a_uri_with_other_objects_is_no_run_directory_and_one_of_another_recipe_is_named(store):
    uri, _ = store
    claim(local(uri), "toy")
    with locked(local(uri), "toy"):
        pass
    claim(local(uri), "toy")
    with pytest.raises(ConfigError, match=f"output_dir={uri} belongs to a run of recipe 'toy', not 'smoke'"):
        claim(local(uri), "smoke")
    write_json(open_stage(local(uri), "k2", "one").folder / "a.json", {})
    with pytest.raises(ConfigError, match=f"output_dir={uri}/k2 exists and is not a run directory"):
        claim(local(f"{uri}/k2"), "toy")


def test_the_copy_of_a_locked_directory_has_the_state_and_no_weights(store, tmp_path, monkeypatch):
    uri, _ = store
    with locked(local(uri), "toy"):
        write_json(open_stage(local(uri), "k2", "one").folder / "manifest.json", {"fingerprint": "one"})
        atomic_write(local(uri) / "k2" / "model.safetensors", os.urandom(remote.SMALL))
        atomic_write(local(uri) / "log.jsonl", b"x" * 2 * remote.SMALL)
        (local(uri) / "k2" / "unfinished").write_text("of a run that died")
    for cache in ("cache", "another machine"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        with locked(local(uri), "toy"):
            assert open_stage(local(uri), "k2", "one").manifest == {"fingerprint": "one"}
            assert not (local(uri) / "k2" / "unfinished").exists()
            assert (local(uri) / "log.jsonl").stat().st_size == 2 * remote.SMALL
    assert not (local(uri) / "k2" / "model.safetensors").exists()


def test_a_second_driver_is_refused_while_the_first_lives_and_not_for_long_when_it_is_dead(store):
    uri, faults = store
    faults.fail_every(10)

    def written():
        (lease,) = listing(f"{uri}/lease").values()
        return lease.mtime

    with driver(uri) as first:
        assert first.stdout.readline() == "held\n"
        began = written()
        wait_until(lambda: written() > began, "the lease is not renewed", seconds=60, pause=0.5)
        with pytest.raises(ConfigError) as error, held(local(uri), BUSY, LIFE_S):
            pass
        assert error.value.exit_code == Exit.BUSY
        assert str(error.value).startswith("in use (held by ")
        assert f"process {first.pid}; if that process is dead, its lease ends within 20 s" in str(error.value)
        first.kill()
    assert written() > began, "the dead do not give up their lease"
    with held(local(uri), BUSY, life_s=3, wait=True):  # the second driver says how old a lease may be
        assert len(listing(f"{uri}/lease")) == 1, "the old one is deleted"
    assert listing(f"{uri}/lease") == {}, "who ends gives up the lease"


def test_of_drivers_that_start_together_one_at_most_holds_the_lease(store):
    uri, _ = store
    start, holders, most = threading.Barrier(4), [], []

    def one(number):
        start.wait(30)
        with suppress(ConfigError), held(local(uri), BUSY, life_s=30):
            holders.append(number)
            most.append(len(holders))
            time.sleep(1)
            holders.remove(number)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most, default=0) <= 1
    assert listing(f"{uri}/lease") == {}


@pytest.fixture
def interruptible():
    """SIGTERM raises KeyboardInterrupt here, as in the commands, and a lost lease is forgotten afterwards."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)
    storage._holds.clear()
    remote._file_system.cache_clear()


def work(file):
    """What a driver does until it is interrupted, and what it writes then."""
    try:
        time.sleep(30)
    finally:
        with pytest.raises(RemoteError, match="the lease of the run directory is lost"):
            atomic_write(file, "late")


def test_a_driver_whose_lease_is_gone_stops_and_writes_no_more(store, interruptible):
    uri, _ = store
    folder = local(uri)
    folder.mkdir(parents=True)

    def run():
        with held(folder, BUSY, life_s=2):
            remove(folder / "lease")
            work(folder / "log.jsonl")

    with pytest.raises(ConfigError, match=f"the lease of {uri} is lost") as error:
        run()
    assert error.value.exit_code == Exit.BUSY
    assert sizes(folder) == {}


def test_a_worker_writes_only_while_its_driver_holds_the_lease(store, interruptible):
    uri, _ = store
    folder = local(uri)
    folder.mkdir(parents=True)
    with held(folder, BUSY, life_s=60):
        lease = lease_of(f"{uri}/k2")
        storage._holds.clear()  # a worker is another process
        adopt(lease)
        atomic_write(folder / "latest.json", "{}")
        remove(folder / "lease")  # by a driver that found it ended
        for write in (
            lambda: atomic_write(folder / "latest.json", "late"),
            lambda: remove_file(folder / "latest.json"),
        ):
            with pytest.raises(RemoteError, match="the lease of the run directory is lost"):
                write()
        storage._holds[uri] = storage.Hold(lease, storage._clock() + 60)
    assert read_bytes(f"{uri}/latest.json") == b"{}"


def test_a_driver_that_cannot_renew_its_lease_in_time_stops(store, interruptible, monkeypatch):
    uri, faults = store
    monkeypatch.setattr(remote, "WAITS_S", (0.1,))
    monkeypatch.setattr(remote, "SDK_ATTEMPTS", 1)
    remote._file_system.cache_clear()
    folder = local(uri)
    folder.mkdir(parents=True)

    def run():
        with held(folder, BUSY, life_s=2):
            faults.status_of = lambda number, environ: 503
            work(folder / "log.jsonl")

    with pytest.raises(ConfigError, match="could not be renewed for 2 s"):
        run()
