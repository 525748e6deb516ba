"""The row that travels from the corpus to the trainer: its columns, who writes and reads each, and rows ↔ tensors.

One row is one sequence: a block of N tokens of the corpus. Tokenisation writes it, reading a store gives it a place in the
order of training, and the rollout of a student's stage adds W windows of K target tokens each. No other module names a
column or knows its type.

    column       Arrow type      shape      content                                                     writer      readers
    seq          int64           ()         63-bit hash of the tokens; names the sequence in its noise  tokenise    R T E
    doc          int64           ()         63-bit hash of the document of the first token              tokenise    E
    tokens       int32[N]        (N,)       token ids                                                   tokenise    R T E
    position     int64           ()         place in the order of training, counted over all epochs     TokenStore  T
    epoch        int64           ()         0 for the first pass over the store; names the noise        TokenStore  R
    anchors      int32[W]        (W,)       position of the last context token of each window           rollout     T
    targets      int32[W·K]      (W, K)     token ids that the teacher made                             rollout     T
    noise_key    int64           ()         key of the noise of the windows                             rollout     T
    temperature  float32         ()         sampling temperature                                        rollout     T
    soft_ids     int32[W·K·M]    (W, K, M)  the M most likely tokens of the teacher at each target      rollout     T
    soft_logp    float32[W·K·M]  (W, K, M)  their log-probabilities, in nats                            rollout     T

    writers      tokenise: data/packing.py, TokenStore: data/token_store.py, rollout: rollouts/actor.py
    readers      R: rollouts/actor.py, T: training/step.py and worker.py, E: evaluation/, benchmarks/

`int32[N]` is a fixed-size list. `position` and `epoch` are never stored: a store adds them when it is read. `soft_ids` and
`soft_logp` exist only where the loss is `soft` and the teacher's distributions travel with the targets. Noise itself does
not travel: `windows_of` computes it again from `noise_key`, `seq` and `anchors`.

What a rollout cost is no property of a row. It travels as metadata of the table's schema (`with_rollout_cost`), which
slicing, Ray Data and Parquet preserve.

Shapes: B rows (sequences), N tokens of a block, W windows, K target tokens of a window, M labels of a target.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # a process that only reads rows has no need of torch, which takes a second to import
    import torch
    from torch import Tensor

    from kforcing.attention.windows import Windows
    from kforcing.distillation.losses import SoftTargets

ROLLOUT_COSTS = ("rollout_s", "rollout_rss_mb", "rollout_gpu_mb")
"""Seconds of an actor for one row; the most resident memory and GPU memory that the actor has used, in MiB."""
_COST_KEY = b"rollout_cost"


def token_schema(block: int) -> pa.Schema:
    """The columns of a token store of N-token blocks."""
    return pa.schema([("seq", pa.int64()), ("doc", pa.int64()), ("tokens", pa.list_(pa.int32(), block))])


PLACE = pa.schema([("position", pa.int64()), ("epoch", pa.int64())])
"""The columns that reading a store adds."""


def rollout_schema(windows: int, k: int, labels: int | None = None) -> pa.Schema:
    """The columns that a rollout of W windows of K tokens adds, with M labels for each token or without."""
    fields = [
        ("anchors", pa.list_(pa.int32(), windows)),
        ("targets", pa.list_(pa.int32(), windows * k)),
        ("noise_key", pa.int64()),
        ("temperature", pa.float32()),
    ]
    if labels:
        fields += [
            ("soft_ids", pa.list_(pa.int32(), windows * k * labels)),
            ("soft_logp", pa.list_(pa.float32(), windows * k * labels)),
        ]
    return pa.schema(fields)


# Arrays → rows


def token_rows(seq_B: np.ndarray, doc_B: np.ndarray, tokens_BN: np.ndarray) -> pa.Table:
    """The rows of a token store."""
    schema = token_schema(tokens_BN.shape[1])
    return pa.Table.from_arrays(_columns(schema, seq_B, doc_B, tokens_BN), schema=schema)


def with_place(rows: pa.Table, positions_B: np.ndarray, epochs_B: np.ndarray) -> pa.Table:
    """The rows with their place in the order of training."""
    return _append(rows, PLACE, positions_B, epochs_B)


def without_place(rows: pa.Table) -> pa.Table:
    """The rows as they are stored."""
    return rows.drop_columns(PLACE.names)


def with_rollout(
    rows: pa.Table, windows: Windows, noise_keys_B: np.ndarray, targets_BWK: Tensor, labels: SoftTargets | None
) -> pa.Table:
    """The rows with their rollouts; `windows.noise_BWK` must be the noise of `noise_keys_B`."""
    values: list[np.ndarray | Tensor] = [windows.anchors_BW, targets_BWK, noise_keys_B, windows.temperature_B]
    top_k = None
    if labels is not None:
        assert labels.ids_BWKM is not None, "only the most likely tokens of a distribution travel with its row"
        values += [labels.ids_BWKM, labels.logp_BWKM]
        top_k = labels.ids_BWKM.shape[-1]
    _, W, K = targets_BWK.shape
    return _append(rows, rollout_schema(W, K, top_k), *values)


def _append(rows: pa.Table, schema: pa.Schema, *values: np.ndarray | Tensor) -> pa.Table:
    for field, column in zip(schema, _columns(schema, *values), strict=True):
        rows = rows.append_column(field, column)
    return rows


def _columns(schema: pa.Schema, *values: np.ndarray | Tensor) -> list[pa.Array]:
    columns = []
    for field, value in zip(schema, values, strict=True):
        array = value.cpu().numpy() if hasattr(value, "cpu") else value
        if pa.types.is_fixed_size_list(field.type):
            numbers = array.astype(field.type.value_type.to_pandas_dtype())
            columns.append(fixed_list(numbers.reshape(len(array), field.type.list_size)))
        else:
            columns.append(pa.array(array, field.type))
    return columns


# Rows → arrays


def sequences_of(rows: pa.Table) -> Tensor:
    """(B,) int64 sequence ids."""
    return _tensor(rows, "seq", np.int64)


def documents_of(rows: pa.Table) -> np.ndarray:
    """(B,) int64 document ids."""
    return rows["doc"].to_numpy()


def tokens_of(rows: pa.Table, device: torch.device | str = "cpu") -> Tensor:
    """(B, N) int64 token ids."""
    return _tensor(rows, "tokens", np.int64).to(device)


def positions_of(rows: pa.Table) -> np.ndarray:
    """(B,) int64 places in the order of training."""
    return rows["position"].to_numpy()


def epochs_of(rows: pa.Table) -> np.ndarray:
    """(B,) int64 epochs."""
    return rows["epoch"].to_numpy()


def has_rollout(rows: pa.Table) -> bool:
    """Whether the rows have windows with targets."""
    return "targets" in rows.column_names


def windows_of(rows: pa.Table, device: torch.device | str = "cpu") -> Windows:
    """The windows of rolled-out rows, with the noise that their targets were made of."""
    from kforcing.attention.windows import Windows
    from kforcing.noise import window_noise

    anchors_BW = _tensor(rows, "anchors", np.int64).to(device)
    key_B, seq_B = (_tensor(rows, name, np.int64).to(device) for name in ("noise_key", "seq"))
    noise_BWK = window_noise(key_B, seq_B, anchors_BW, _block_shape(rows)[1])
    return Windows(tokens_of(rows, device), anchors_BW, noise_BWK, _tensor(rows, "temperature", np.float32).to(device))


def targets_of(rows: pa.Table, device: torch.device | str = "cpu") -> Tensor:
    """(B, W, K) int64 token ids that the teacher made."""
    return _tensor(rows, "targets", np.int64).unflatten(1, _block_shape(rows)).to(device)


def labels_of(rows: pa.Table, device: torch.device | str = "cpu") -> SoftTargets | None:
    """The teacher's distributions at the targets; None where they do not travel with the rows."""
    from kforcing.distillation.losses import SoftTargets

    if "soft_ids" not in rows.column_names:
        return None
    shape = (*_block_shape(rows), -1)
    logp, ids = _tensor(rows, "soft_logp", np.float32), _tensor(rows, "soft_ids", np.int64)
    return SoftTargets(logp.unflatten(1, shape).to(device), ids.unflatten(1, shape).to(device))


def _block_shape(rows: pa.Table) -> tuple[int, int]:
    """W and K of rolled-out rows."""
    windows, targets = (rows.schema.field(name).type.list_size for name in ("anchors", "targets"))
    return windows, targets // windows


def _tensor(rows: pa.Table, column: str, dtype: type[np.generic]) -> Tensor:
    import torch

    return torch.from_numpy(to_numpy(rows[column]).astype(dtype))


# What a rollout cost


def with_rollout_cost(rows: pa.Table, cost: dict[str, float]) -> pa.Table:
    """The rows with the `ROLLOUT_COSTS` of making them."""
    return rows.replace_schema_metadata({**(rows.schema.metadata or {}), _COST_KEY: json.dumps(cost).encode()})


def rollout_cost(rows: pa.Table) -> dict[str, float]:
    """The `ROLLOUT_COSTS` of rolled-out rows, and {} for other rows.

    Of rows that were rolled out by several calls, it is the cost of one of them.
    """
    if rows.schema.metadata and _COST_KEY in rows.schema.metadata:
        return json.loads(rows.schema.metadata[_COST_KEY])
    # Rollouts that were cached by releases up to 0.1 have the costs as columns.
    return {name: rows[name][0].as_py() for name in ROLLOUT_COSTS if name in rows.column_names}


# Arrow columns of arrays


def fixed_list(values: np.ndarray) -> pa.FixedSizeListArray:
    """A 2-D array as an Arrow column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists as a 2-D array, or a plain column as a 1-D array."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), column.type.list_size)
    return column.to_numpy()
