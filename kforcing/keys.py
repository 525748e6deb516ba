"""Names of noise streams → keys, without torch, which takes a second to import."""

from __future__ import annotations

import hashlib


def derive_key(seed: int, *stream: str | int) -> int:
    """A 63-bit key for a named noise stream, for example ``derive_key(seed, "rollout", "k2", epoch)``.

    Different seeds or stream names give unrelated keys; the result fits a signed 64-bit column.
    """
    text = "\x1f".join([str(seed), *map(str, stream)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
