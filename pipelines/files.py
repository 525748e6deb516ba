"""Files and folders that appear whole or not at all; those of the copy of a URI are uploaded then."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.failures import Failure
from pipelines.log import log
from pipelines.storage import push

_KEPT_FROM = 1 << 26


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` when the block ends without an error.

    Content and name are on disk (fsync) before the block is left, so neither a killed process nor a power failure leaves
    half a file under the final name. When the block raises, the temporary file is removed and `path` stays as it was.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)
    push(path)


@contextmanager
def atomic_folder(path: Path, last: str | None = None) -> Iterator[Path]:
    """A new temporary folder to fill, which becomes `path` when the block ends without an error.

    `path` must not exist, or be an empty folder. As with `atomic_file`, its files are on disk before it has its name, and a
    block that raises leaves nothing behind. In object storage the file named `last` appears when all others are there.
    """
    with _new_folder(path.with_name(f".{path.name}.partial")) as partial:
        yield partial
        for part in (*partial.rglob("*"), partial):
            _sync(part)
        os.replace(partial, path)
    _sync(path.parent)
    push(path, last)


@contextmanager
def added_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill, whose files move into an existing `folder` when the block ends without an error.

    The file named `last` moves when all others are on disk: a folder that has it is complete.
    """
    with _new_folder(folder / ".partial") as partial:
        yield partial
        for file in sorted(partial.iterdir(), key=lambda f: f.name == last):
            _sync(file)
            if file.name == last:
                _sync(folder)
            os.replace(file, folder / file.name)
            push(folder / file.name)
    _sync(folder)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """An empty folder, without what a killed process left in it, for the time of the block."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file atomically; text is encoded as UTF-8."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def strict_json(record: Any, **options: Any) -> str:
    """JSON that every parser reads: NaN and infinities, for which JSON has no word, become null."""
    return json.dumps(_with_nulls(record), allow_nan=False, **options)


def _with_nulls(record: Any) -> Any:
    if isinstance(record, dict):
        return {name: _with_nulls(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [_with_nulls(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def write_json(path: Path, record: Any) -> None:
    """Write a record as indented `strict_json`, atomically."""
    atomic_write(path, strict_json(record, indent=2))


def content_digest(path: Path) -> str:
    """A hash of a file's content, in 32 hex digits.

    That of a large file is kept in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`) under the file's path, size
    and time, so that it is computed once.
    """
    stat = path.stat()
    if stat.st_size < _KEPT_FROM:
        return _digest(path)
    name = hashlib.blake2b(repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns)).encode(), digest_size=16)
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kforcing" / "digests" / name.hexdigest()
    try:
        return kept.read_text()
    except OSError:
        digest = _digest(path)
    with suppress(OSError):  # a home that cannot be written to costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, digest)
    return digest


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    hash_file(digest, path)
    return digest.hexdigest()


def hash_file(digest: hashlib.blake2b, path: Path) -> None:
    """Add a file's content to a hash."""
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)


def checksum(path: Path) -> int:
    """The CRC-32 of a file's content, which shows a flipped byte; 0.4 s a GiB on one core for a file in memory."""
    value = 0
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def changed(folder: Path, checksums: dict[str, int]) -> list[str]:
    """The files of a folder, out of those with a checksum, that are missing or do not hold what was written to them.

    Raises Failure for a name that leads out of the folder, which no run has written.
    """
    for name in checksums:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise Failure(
                f"the list of files in {folder} names {name}, a path outside of this folder, which this program never "
                "writes; remove the folder and run the same command again"
            )

    def differs(name: str) -> bool:
        return not (folder / name).is_file() or checksum(folder / name) != checksums[name]

    with ThreadPoolExecutor(8) as pool:  # `zlib` lets threads run side by side
        return [name for name, wrong in zip(checksums, pool.map(differs, checksums), strict=True) if wrong]


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, once in a process."""
    log.warning(text)


def read_json(path: Path) -> Any:
    """The record in a JSON file; None where there is none, or where the file is empty or cut, which a warning says."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        warn_once(f"{path} is empty or cut ({error}) and is left aside")
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
