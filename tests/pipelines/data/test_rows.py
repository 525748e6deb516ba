"""Columns of the row that travels from the corpus to the trainer, and rows ↔ tensors."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kforcing.attention.windows import Windows
from kforcing.distillation.losses import SoftTargets
from kforcing.noise import window_noise
from pipelines.data.rows import (
    PLACE,
    documents_of,
    epochs_of,
    fixed_list,
    has_rollout,
    labels_of,
    positions_of,
    rollout_cost,
    rollout_schema,
    sequences_of,
    targets_of,
    to_numpy,
    token_rows,
    token_schema,
    tokens_of,
    windows_of,
    with_place,
    with_rollout,
    with_rollout_cost,
    without_place,
)

B, N, W, K, M = 3, 6, 4, 2, 5
COST = {"rollout_s": 0.5, "rollout_rss_mb": 700.0, "rollout_gpu_mb": 0.0}
TOKENS = torch.arange(B * N).view(B, N)


def placed_rows():
    rows = token_rows(np.array([2**62, 7, 8]), np.array([1, 1, 2]), TOKENS.numpy())
    return with_place(rows, np.array([10, 11, 12]), np.array([0, 0, 1]))


def rollout(soft):
    """Windows with the noise of their keys, targets and labels."""
    g, keys = torch.Generator().manual_seed(0), np.array([2**62 + 1, 4, 5])
    anchors = torch.randint(0, N, (B, W), generator=g)
    noise = window_noise(torch.from_numpy(keys), sequences_of(placed_rows()), anchors, K)
    windows = Windows(TOKENS, anchors, noise, torch.rand(B, generator=g))
    ids = torch.randint(0, 50_000, (B, W, K, M), generator=g)
    labels = SoftTargets(torch.rand(B, W, K, M, generator=g).log(), ids) if soft else None
    return windows, keys, torch.randint(0, 50_000, (B, W, K), generator=g), labels


def test_token_rows_give_back_the_arrays_that_they_were_made_of():
    rows = placed_rows()
    assert rows.schema == pa.schema([*token_schema(N), *PLACE])
    assert torch.equal(tokens_of(rows), TOKENS)
    assert sequences_of(rows).tolist() == [2**62, 7, 8]
    assert documents_of(rows).tolist() == [1, 1, 2]
    assert positions_of(rows).tolist() == [10, 11, 12]
    assert epochs_of(rows).tolist() == [0, 0, 1]
    assert not has_rollout(rows)
    assert without_place(rows).schema == token_schema(N)


@pytest.mark.parametrize("soft", [False, True])
def test_rolled_out_rows_give_back_windows_targets_and_labels(soft):
    windows, keys, targets, labels = rollout(soft)
    rows = with_rollout(placed_rows(), windows, keys, targets, labels)
    assert rows.schema == pa.schema([*token_schema(N), *PLACE, *rollout_schema(W, K, M if soft else None)])
    assert has_rollout(rows)
    for some in (slice(0, B), slice(1, 3)):
        part = rows.slice(some.start, some.stop - some.start)
        found = windows_of(part)
        assert torch.equal(found.context_BN, windows.context_BN[some])
        assert torch.equal(found.anchors_BW, windows.anchors_BW[some])
        assert torch.equal(found.noise_BWK, windows.noise_BWK[some])
        assert torch.equal(found.temperature_B, windows.temperature_B[some])
        assert torch.equal(targets_of(part), targets[some])
        if labels is None:
            assert labels_of(part) is None
        else:
            assert torch.equal(labels_of(part).ids_BWKM, labels.ids_BWKM[some])
            assert torch.equal(labels_of(part).logp_BWKM, labels.logp_BWKM[some])


def test_the_cost_of_a_rollout_survives_slices_concatenation_and_parquet(tmp_path):
    rows = with_rollout_cost(placed_rows(), COST)
    assert rows.column_names == placed_rows().column_names
    pq.write_table(without_place(rows), tmp_path / "rows.parquet", row_group_size=1)
    stored = [pq.ParquetFile(tmp_path / "rows.parquet").read_row_group(i) for i in range(B)]
    again = with_place(pa.concat_tables(stored), np.arange(B), np.zeros(B, np.int64))
    for table in (rows, rows.slice(1, 1), again, again.slice(2, 1)):
        assert rollout_cost(table) == COST
    assert rollout_cost(placed_rows()) == {}


def test_the_cost_of_a_rollout_is_found_in_the_columns_that_earlier_releases_cached():
    rows = placed_rows()
    for name, value in COST.items():
        rows = rows.append_column(name, pa.array(np.full(B, value)))
    assert rollout_cost(rows) == COST


def test_fixed_lists_survive_slicing():
    values = np.arange(12).reshape(4, 3)
    table = pa.table({"x": fixed_list(values)}).slice(1, 2)
    assert (to_numpy(table["x"]) == values[1:3]).all()
