import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.packing import SplitWriter, pack, sequence_ids, write_blocks
from pipelines.data.rows import to_numpy

IDS = [[5, 6, 7], [8], [9, 10]]


def arrays(lists):
    return [np.array(ids, np.int32) for ids in lists]


def test_packing_ends_documents_with_eos_and_names_the_document_of_each_token():
    tokens, docs = pack(arrays(IDS), np.array([100, 200, 300]), eos=1)
    assert tokens.tolist() == [5, 6, 7, 1, 8, 1, 9, 10, 1]
    assert docs.tolist() == [100, 100, 100, 100, 200, 200, 300, 300, 300]
    assert (tokens.dtype, docs.dtype) == (np.int32, np.int64)
    assert [len(array) for array in pack([], np.array([], np.int64), eos=1)] == [0, 0]


def test_blocks_belong_to_the_document_of_their_first_token_and_the_rest_is_left_over(tmp_path):
    entry = write_blocks(tmp_path, *pack(arrays(IDS), np.array([100, 200, 300]), eos=1), block=4)
    rows = pq.read_table(tmp_path / entry["file"])
    found = dict(zip(map(tuple, to_numpy(rows["tokens"]).tolist()), rows["doc"].to_pylist(), strict=True))
    assert found == {(5, 6, 7, 1): 100, (8, 1, 9, 10): 200}
    assert (entry["rows"], entry["tokens"].tolist(), entry["docs"].tolist()) == (2, [1], [300])


def test_sequence_ids_are_hashes_of_content():
    ids = sequence_ids(np.array([[1, 2], [3, 4], [1, 2]], np.int32))
    assert ids[0] == ids[2] != ids[1]
    assert (ids >= 0).all()


@pytest.mark.parametrize("docs_per_shard", [1, 2, 7, 100])
def test_every_block_that_the_tokens_can_fill_is_written(tmp_path, docs_per_shard):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 100)
    documents, numbers = [np.full(n, i + 2, np.int32) for i, n in enumerate(lengths)], np.arange(100) + 2
    split = SplitWriter(tmp_path, block=16)
    for first in range(0, 100, docs_per_shard):
        shard = slice(first, first + docs_per_shard)
        packed = write_blocks(tmp_path, *pack(documents[shard], numbers[shard], eos=1), split.block)
        split.add({"documents": len(documents[shard]), "null": 0, "blank": 0, "special": 0, **packed})
    split.write_left()
    tables = [pq.read_table(tmp_path / shard["file"]) for shard in split.shards]
    tokens = np.concatenate([to_numpy(table["tokens"]) for table in tables])
    owners = np.concatenate([table["doc"].to_numpy() for table in tables])
    total = int(lengths.sum()) + 100
    assert split.counts["documents"] == 100
    assert split.tokens == tokens.size == total // 16 * 16
    assert ((tokens[:, 0] == owners) | (tokens[:, 0] == 1)).all()
    assert (tokens == 1).sum() >= 100 - 16  # the tokens that fill no block are at most 15


def test_a_split_without_rows_has_no_blocks(tmp_path):
    split = SplitWriter(tmp_path, block=16)
    split.write_left()
    assert (split.shards, split.tokens) == ([], 0)
