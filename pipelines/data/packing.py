"""Tokenised documents → shards of N-token blocks, and the manifest of a split.

    documents of a task ─► pack ─► write_blocks ─► a shard, and the tokens left over, fewer than a block
    what all tasks left over ─► SplitWriter ─► more shards, and at most one unfinished block in the end

So a split of T tokens has ⌊T / N⌋ blocks, however its documents were dealt to tasks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.rows import token_rows
from pipelines.data.token_store import write_manifest, write_shard

COUNTS = ("documents", "null", "blank", "special")
"""Documents in the blocks; rows left out: without a text, and blank ones; special tokens that documents spell out."""
PACKED = pa.schema(
    [("split", pa.string()), ("file", pa.string()), ("rows", pa.int64()), ("crc32", pa.int64())]
    + [(name, pa.int64()) for name in COUNTS]
    + [("tokens", pa.list_(pa.int32())), ("docs", pa.list_(pa.int64()))]
)
"""What packing some documents of a split gives: an entry of its manifest, counts, and the tokens that fill no block."""
_LEFT_BLOCKS = 1024


def pack(ids: list[np.ndarray], docs: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate documents, each followed by EOS.

    Returns:
        (T,) int32 tokens and (T,) int64, the document to which each token belongs.
    """
    tokens = np.concatenate([np.zeros(0, np.int32), *(np.append(document, eos) for document in ids)])
    return tokens.astype(np.int32), np.repeat(docs, [len(document) + 1 for document in ids])


def sequence_ids(blocks: np.ndarray) -> np.ndarray:
    """63-bit hash of the content of each block. It names the sequence in its noise and orders the blocks of a shard."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in blocks]
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)).astype(np.int64)


def write_blocks(folder: Path, tokens: np.ndarray, docs: np.ndarray, block: int) -> dict[str, Any]:
    """Write the whole blocks of `pack`'s arrays as one shard, named by its content and ordered at random.

    Returns:
        the shard's `file`, `rows` (0 without a whole block, and so without a file) and `crc32`, and the `tokens` and `docs`
        left over.
    """
    n = len(tokens) // block
    end = n * block
    entry: dict[str, Any] = {"file": "", "rows": 0, "crc32": 0}
    if n:
        blocks, owners = tokens[:end].reshape(n, block), docs[:end:block]
        seq = sequence_ids(blocks)
        order = np.argsort(seq, kind="stable")
        name = hashlib.blake2b(seq[order].tobytes(), digest_size=8).hexdigest()
        entry = write_shard(folder, name, token_rows(seq[order], owners[order], blocks[order]))
    return {**entry, "tokens": tokens[end:], "docs": docs[end:]}


@dataclass
class SplitWriter:
    """What is written of one split so far, and the ends of its shards that fill no block yet."""

    folder: Path
    block: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    left_tokens: int = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of `PACKED`."""
        if row["rows"]:
            self.shards.append({name: row[name] for name in ("file", "rows", "crc32")})
        self.counts.update({name: row[name] for name in COUNTS})
        self.left.append((np.array(row["tokens"], np.int32), np.array(row["docs"], np.int64)))
        self.left_tokens += len(row["tokens"])
        if self.left_tokens >= _LEFT_BLOCKS * self.block:
            self.write_left()

    def write_left(self) -> None:
        """Write the ends of the shards, joined, as a shard of their own."""
        if not self.left:  # the corpus has no rows
            return
        tokens, docs = map(np.concatenate, zip(*self.left, strict=True))
        entry = write_blocks(self.folder, tokens, docs, self.block)
        self.left, self.left_tokens = [(entry.pop("tokens"), entry.pop("docs"))], 0
        if entry["rows"]:
            self.shards.append(entry)

    @property
    def tokens(self) -> int:
        """Tokens in the blocks that are written."""
        return self.block * sum(shard["rows"] for shard in self.shards)

    def finish(self, seconds: float) -> None:
        """Write the manifest."""
        facts = {"tokens": self.tokens, **self.counts, "seconds": round(seconds, 2)}
        write_manifest(self.folder, self.shards, **facts)
