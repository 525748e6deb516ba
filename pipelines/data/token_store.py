"""Token blocks and rollouts on disk: Parquet shards of small row groups, readable by position.

A run reads rows by *position*: 0, 1, 2, … over all epochs. The row at a position is a pure function of (store, seed,
position). The order therefore does not depend on workers, batch sizes or restarts, and an interrupted stage continues at
the exact row.

Each epoch has its own random order of row groups. An epoch is read in `LANES` interleaved lanes: the neighbours in a batch
come from different row groups, while each lane reads its row groups one after the other. The columns are in
`pipelines/data/rows.py`.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kforcing.keys import derive_key
from kforcing.remote import listing, local, open_uri, read_bytes, retried, uri_of
from pipelines.data.rows import with_place
from pipelines.files import atomic_file, changed, checksum, read_json, write_json
from pipelines.log import log

ROWS_PER_GROUP = 64
LANES = 16
T = TypeVar("T")
MANIFEST = "manifest.json"


def write_shard(folder: Path, name: str, table: pa.Table) -> dict[str, Any]:
    """Write one shard atomically. Returns its entry for the manifest of the store: `file`, `rows`, `crc32`."""
    final = folder / f"{name}.parquet"
    folder.mkdir(parents=True, exist_ok=True)  # the copy of a URI may not be on this node yet
    with atomic_file(final) as partial:
        pq.write_table(table, partial, row_group_size=ROWS_PER_GROUP, compression="zstd")
        entry = {"file": final.name, "rows": len(table), "crc32": checksum(partial)}
    if uri_of(final):
        final.unlink()  # it is uploaded, and is read from there
    return entry


def shard_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of the shards that an interrupted run left. One that is cut is removed, which a warning says."""
    if uri := uri_of(folder):
        names = [name for name in sorted(listing(uri)) if "/" not in name and name.endswith(".parquet")]
        return [_uploaded_entry(f"{uri}/{name}", name) for name in names]
    entries = ((file, _rows(file)) for file in sorted(folder.glob("*.parquet")))
    return [{"file": file.name, "rows": rows, "crc32": checksum(file)} for file, rows in entries if rows is not None]


def _uploaded_entry(uri: str, name: str) -> dict[str, Any]:
    content = read_bytes(uri)
    return {"file": name, "rows": pq.read_metadata(pa.BufferReader(content)).num_rows, "crc32": zlib.crc32(content)}


def _rows(file: Path) -> int | None:
    """Rows of a shard, from its footer; None for one that is cut or missing, which is removed."""
    try:
        return pq.read_metadata(file).num_rows
    except (pa.ArrowInvalid, FileNotFoundError):
        _remove(file)
        return None


def _remove(file: Path) -> None:
    log.warning(f"{file} is missing or does not hold what was written to it; it is made again")
    file.unlink(missing_ok=True)


def is_complete(folder: Path) -> bool:
    """Whether a store has its manifest, and its shards hold what was written to them.

    The whole store is read for it. A shard that was changed is removed, which a warning says. Shards of earlier releases have
    no checksum, so only their footers are read. In object storage, where objects appear whole and have checksums of their
    own, shards must be there and are not read.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return False
    if uri := uri_of(folder):
        return {shard["file"] for shard in manifest["shards"]} <= listing(uri).keys()
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    wrong = changed(folder, {name: shard["crc32"] for name, shard in shards.items() if "crc32" in shard})
    for name in wrong:
        _remove(folder / name)
    return not wrong and all("crc32" in s or _rows(folder / name) == s["rows"] for name, s in shards.items())


def write_manifest(folder: Path, shards: list[dict[str, Any]], **facts: Any) -> None:
    """Write the manifest, which marks a store as complete.

    Shards are listed by file name, so their order does not depend on the order in which they were written.
    """
    record = {"rows": sum(s["rows"] for s in shards), **facts, "shards": sorted(shards, key=lambda s: s["file"])}
    write_json(folder / MANIFEST, record)


def read_shard(folder: Path, file: str, read: Callable[[pq.ParquetFile], T]) -> T:
    """What a function reads from a shard, on this node or over the network."""
    if not (uri := uri_of(folder)):
        return read(pq.ParquetFile(folder / file))
    system, path = open_uri(f"{uri}/{file}")
    return retried(uri, lambda: read(pq.ParquetFile(path, filesystem=system)))


class TokenStore:
    """Random access to the rows of a finished store.

    Args:
        folder: of the store; a path or a URI, from which row groups are read one by one.
        seed: determines the order of the rows.
    """

    def __init__(self, folder: str | Path, seed: int):
        self.folder = local(folder)
        self.manifest = json.loads(read_bytes(self.folder / MANIFEST))
        self.seed = seed
        self.groups = [
            (shard["file"], index, min(ROWS_PER_GROUP, shard["rows"] - index * ROWS_PER_GROUP))
            for shard in self.manifest["shards"]
            for index in range(-(-shard["rows"] // ROWS_PER_GROUP))
        ]
        self.lanes = min(LANES, len(self.groups))
        self._read_group = functools.lru_cache(maxsize=2 * LANES)(self._read_group_uncached)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._epoch_order_uncached)

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows of one epoch. An epoch leaves out fewer than `LANES` rows, and each epoch leaves out others."""
        return self.manifest["rows"] // self.lanes * self.lanes

    def _epoch_order_uncached(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(derive_key(self.seed, "order", epoch)).permutation(len(self.groups))
        ends = np.cumsum([self.groups[g][2] for g in order])
        return order, ends

    def _read_group_uncached(self, group: int) -> pa.Table:
        file, index, _ = self.groups[group]
        return read_shard(self.folder, file, lambda shard: shard.read_row_group(index))

    def locate(self, position: int) -> tuple[int, int, int]:
        """Position → (epoch, row group, row inside it)."""
        epoch, offset = divmod(position, self.rows_per_epoch)
        order, ends = self._epoch_order(epoch)
        row = offset % self.lanes * (self.rows_per_epoch // self.lanes) + offset // self.lanes
        rank = int(np.searchsorted(ends, row, side="right"))
        group = int(order[rank])
        return epoch, group, row - int(ends[rank]) + self.groups[group][2]

    def read(self, positions: np.ndarray) -> pa.Table:
        """The rows at the given positions, in that order, with the columns `position` and `epoch`."""
        places = [self.locate(int(p)) for p in positions]
        table = pa.concat_tables([self._read_group(group).slice(row, 1) for _, group, row in places]).combine_chunks()
        return with_place(table, positions, np.array([epoch for epoch, _, _ in places]))


@functools.lru_cache(maxsize=4)
def open_store(folder: str, seed: int) -> TokenStore:
    """A `TokenStore` that is opened once in each process."""
    return TokenStore(folder, seed)
