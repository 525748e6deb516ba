import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.rows import to_numpy, token_rows
from pipelines.data.token_store import LANES, TokenStore, is_complete, shard_entries, write_manifest, write_shard


@pytest.fixture
def store(tmp_path):
    def make(sizes, seed=0):
        shards, start = [], 0
        for i, n in enumerate(sizes):
            ids = np.arange(start, start + n)
            table = token_rows(ids, ids, np.stack([ids, ids * 2], 1))
            shards.append(write_shard(tmp_path, f"shard-{i}", table))
            start += n
        write_manifest(tmp_path, shards)
        return TokenStore(tmp_path, seed)

    return make


def test_an_epoch_reads_every_row_once(store):
    s = store([100, 64, 300, 7])
    assert s.rows_per_epoch == 471 // 9 * 9  # 9 row groups make 9 lanes
    rows = s.read(np.arange(s.rows_per_epoch))
    seq = rows["seq"].to_numpy()
    assert len(set(seq.tolist())) == s.rows_per_epoch
    assert (to_numpy(rows["tokens"])[:, 1] == 2 * seq).all()
    assert set(rows["epoch"].to_numpy().tolist()) == {0}


def test_the_row_at_a_position_depends_on_store_seed_and_position_alone(store):
    s = store([100, 64, 300, 7])
    whole = s.read(np.arange(1000))
    again = TokenStore(s.folder, 0)
    for part in ([999, 3, 500], [17]):
        assert again.read(np.array(part))["seq"].to_pylist() == [whole["seq"][i].as_py() for i in part]
    assert TokenStore(s.folder, 1).read(np.arange(50))["seq"].to_pylist() != whole["seq"].to_pylist()[:50]


def test_epochs_have_different_orders(store):
    s = store([640])
    n = s.rows_per_epoch
    first, second = (s.read(np.arange(e * n, (e + 1) * n))["seq"].to_pylist() for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_neighbours_come_from_different_row_groups(store):
    s = store([64 * 40])
    groups = [s.locate(p)[1] for p in range(LANES)]
    assert len(set(groups)) == LANES


def test_a_store_with_fewer_groups_than_lanes_reads_every_row_once(store):
    s = store([3])
    assert sorted(s.read(np.arange(3))["seq"].to_pylist()) == [0, 1, 2]
    assert s.read(np.arange(7))["epoch"].to_pylist() == [0, 0, 0, 1, 1, 1, 2]


def flip(file, where=0.5):
    """Flip a bit of a byte of a file."""
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)


@pytest.fixture
def warnings(caplog):
    return caplog


@pytest.mark.parametrize("where", [0, 0.2, 0.5, 0.999])
def test_a_flipped_bit_of_a_shard_is_named_and_the_shard_removed(store, warnings, where):
    folder = store([100, 64]).folder
    assert is_complete(folder)
    assert warnings.records == []
    flip(folder / "shard-1.parquet", where)
    assert not is_complete(folder)
    assert not (folder / "shard-1.parquet").exists()
    (line,) = (record.getMessage() for record in warnings.records)
    assert line == f"{folder}/shard-1.parquet is missing or does not hold what was written to it; it is made again"
    assert shard_entries(folder) == TokenStore(folder, 0).manifest["shards"][:1]


@pytest.mark.parametrize("text", ["", '{"rows": 1'])
def test_a_store_with_a_cut_manifest_is_not_complete(store, warnings, text):
    folder = store([100]).folder
    (folder / "manifest.json").write_text(text)
    assert not is_complete(folder)
    assert f"{folder}/manifest.json is empty or cut" in warnings.text
    assert [entry["rows"] for entry in shard_entries(folder)] == [100]


def test_a_store_of_an_earlier_release_has_no_checksums_and_its_cut_shards_are_found(store, warnings):
    folder = store([100, 64]).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        del shard["crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert is_complete(folder)
    file = folder / "shard-0.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert not is_complete(folder)
    assert f"{file} is missing or does not hold" in warnings.text


def test_a_cut_shard_of_an_interrupted_run_is_removed(store, warnings):
    folder = store([100, 64]).folder
    (folder / "manifest.json").unlink()
    (folder / "shard-0.parquet").write_bytes(b"")
    assert [entry["file"] for entry in shard_entries(folder)] == ["shard-1.parquet"]
    assert [file.name for file in folder.iterdir()] == ["shard-1.parquet"]
    assert pq.read_table(folder / "shard-1.parquet").num_rows == 64
