"""Run directories and caches in object storage: `output_dir` and `data.cache_dir` may be URIs.

A run works on paths. That of a URI is its copy on this node (see `kforcing.remote`), and the URI has the truth:

    what is complete    `pipelines.files` uploads it when it gets its name: data first, the file that marks it last
    who reads it        `fetch` on the node that needs it; jobs carry addresses (URIs), because each node has its own copy
    stores of tokens    their shards are in the URI alone, and are read by row group over the network
    checkpoints         each rank uploads the files that it wrote; when all have, rank 0 writes `latest.json`
    log.jsonl           is uploaded whole every minute, and when a stage or the run ends

So a driver on another machine finds what is finished, and a stage that is not goes on from its newest checkpoint. Working on
copies was chosen over direct writes because transformers, DeepSpeed and matplotlib write to paths alone, and because an
object appears whole or not at all: what was being made when a run died is not in the URI, and its copy is removed.

A lease takes the place of the lock of a folder. A driver writes an object below `lease/` and then lists all of them: if
another one is alive, it withdraws. Lists of S3, GCS and Azure show every object that was written before them, so of two
drivers at most one stays, and no conditional writes are needed; where two withdraw from each other, each tries again after a
random pause. A thread renews the lease by writing it again. Its age is the difference of two times that the store gave (of
the own lease and of the other one), so clocks of machines do not count. A driver whose lease was lost is interrupted and
writes no more.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from kforcing.remote import (
    THREADS,
    RemoteError,
    copy_whole,
    listing,
    open_uri,
    read_bytes,
    retried,
    stamp,
    uri_of,
)
from pipelines.config.section import ConfigError
from pipelines.failures import Exit
from pipelines.log import log

LEASE_S = 60.0
"""Seconds after its last renewal when a lease ends."""
CLOCK_S = 2.0
"""Seconds by which the lease of another driver must be older than that: stores tell times in whole seconds."""
CLAIMS = 3
"""How often a driver writes a lease before it gives up."""
MOST_COPIED = 4 << 30
"""Bytes up to which S3 copies an object by itself."""
_lost: set[str] = set()
"""URIs whose lease this process has lost."""


def push(path: Path) -> None:
    """Upload a file of a copy, or all files of a folder of it, the one that was written last at the end; other paths are left
    alone.

    Raises RemoteError when that fails, or when the lease of the run directory is lost.
    """
    uri = uri_of(path)
    if uri is None:
        return
    if any(uri.startswith(f"{lost}/") for lost in _lost):
        raise RemoteError(f"{uri} is not written: the lease of the run directory is lost")
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        *first, last = sorted(files, key=lambda file: file.stat().st_mtime_ns)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(push, first))
        return push(last)
    system, target = open_uri(uri)

    def upload() -> None:
        copy_whole(None, str(path), system, target, path.stat().st_size)
        stamp(path, system.get_file_info(target))

    retried(uri, upload)


def remove(path: Path) -> None:
    """Remove a folder, and its objects when it is the copy of a URI; nothing when it is not there."""
    if uri := uri_of(path):
        system, target = open_uri(uri)
        with suppress(FileNotFoundError):
            retried(uri, lambda: system.delete_dir(target))
    shutil.rmtree(path, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Remove a file, and its object when it is the copy of one; nothing when it is not there."""
    if uri := uri_of(path):
        system, target = open_uri(uri)
        with suppress(FileNotFoundError):
            retried(uri, lambda: system.delete_file(target))
    path.unlink(missing_ok=True)


def move(old: Path, new: Path) -> None:
    """Rename a folder, and move its objects when it is the copy of a URI: all are copied before the first is deleted."""
    if (uri := uri_of(old)) and (to := uri_of(new)):
        system, _ = open_uri(uri)

        def copy(name: str, size: int) -> None:
            (_, source), (_, target) = open_uri(f"{uri}/{name}"), open_uri(f"{to}/{name}")
            if size > MOST_COPIED:
                retried(uri, lambda: copy_whole(system, source, system, target, size))
            else:
                retried(uri, lambda: system.copy_file(source, target))

        found = listing(uri)
        for name in sorted(found, key=lambda name: "/" not in name and name.endswith(".json")):
            copy(name, found[name].size)
    old.rename(new)
    remove(old)


def sizes(folder: Path) -> dict[str, int]:
    """Name below a folder → bytes of each file; of a copy, those of the objects of its URI."""
    if uri := uri_of(folder):
        return {name: info.size for name, info in listing(uri).items()}
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def probe(folder: Path) -> None:
    """Write, read and delete a small object in the URI of a copy. Raises RemoteError in one line when one of it fails."""
    if (uri := uri_of(folder)) is None:
        return
    name = f".probe-{uuid.uuid4().hex[:8]}"
    _put(uri, name, b"probe")
    if read_bytes(f"{uri}/{name}") != b"probe":
        raise RemoteError(f"{uri} does not return what was written to it; check the store")
    remove_file(folder / name)


def _put(uri: str, name: str, content: bytes) -> None:
    system, path = open_uri(f"{uri}/{name}")

    def put() -> None:
        with system.open_output_stream(path) as stream:
            stream.write(content)

    retried(uri, put)


class Lease:
    """The right to write to a URI, which other drivers see. `held` takes and renews it."""

    def __init__(self, uri: str, life_s: float):
        self.uri, self.life_s = uri, life_s
        self.name = f"{uuid.uuid4().hex}.json"
        self.holder = f"{socket.gethostname()}, process {os.getpid()}"

    def renew(self) -> None:
        """Write the object anew."""
        _put(self.uri, f"lease/{self.name}", json.dumps({"holder": self.holder}).encode())

    def exists(self) -> bool:
        """Whether nobody has deleted the object."""
        return self.name in listing(f"{self.uri}/lease")

    def others(self) -> list[str]:
        """Who holds other leases that are alive; the own one has just been written. Those of the dead are deleted."""
        found = listing(f"{self.uri}/lease")
        if (own := found.pop(self.name, None)) is None:
            return ["a run that has deleted this lease"]
        alive = []
        for name, info in found.items():
            with suppress(FileNotFoundError):  # it was given up just now
                if (own.mtime - info.mtime).total_seconds() < self.life_s + CLOCK_S:
                    alive.append(json.loads(read_bytes(f"{self.uri}/lease/{name}") or b"{}").get("holder", name))
                else:
                    self._delete(name)
        return alive

    def give_up(self) -> None:
        """Delete the object."""
        self._delete(self.name)

    def _delete(self, name: str) -> None:
        system, path = open_uri(f"{self.uri}/lease/{name}")
        with suppress(FileNotFoundError):
            retried(self.uri, lambda: system.delete_file(path))


@contextmanager
def held(folder: Path, busy: str, life_s: float = LEASE_S, wait: bool = False) -> Iterator[None]:
    """Hold the lease of a copy's URI while the block runs; other paths have none.

    Args:
        busy: text of the ConfigError when another driver holds it.
        life_s: seconds after which the lease of a dead driver ends; all drivers must give the same.
        wait: wait until it is free, instead of raising ConfigError.
    Raises:
        ConfigError: with the exit code `BUSY`, when another driver holds the lease, or has taken it from this one.
    """
    uri = uri_of(folder)
    if uri is None:
        yield
        return
    lease = Lease(uri, life_s)
    began = _take(lease, busy, wait)
    _lost.discard(uri)
    done, lost = threading.Event(), threading.Event()
    thread = threading.Thread(target=_renew, args=(lease, began, done, lost), daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        if lost.is_set():
            raise ConfigError(
                f"the lease of {uri} is lost: it could not be renewed for {life_s:g} s, or another run has taken it. Nothing "
                "more is written there. Run the same command to continue when no other run does",
                Exit.BUSY,
            ) from None
        raise
    finally:
        done.set()
        thread.join(timeout=life_s)
        with suppress(RemoteError):  # then it ends by itself
            lease.give_up()


def _take(lease: Lease, busy: str, wait: bool) -> float:
    """Write a lease until it is the only one, `CLAIMS` times or without end; returns the time at which it was written."""
    claims = 0
    while True:
        began = time.monotonic()
        lease.renew()
        others = lease.others()
        if not others:
            return began
        lease.give_up()
        claims += 1
        if claims == 1 and wait:
            log.info(f"{lease.uri} is in use by {others[0]}; waiting")
        if claims == CLAIMS and not wait:
            raise ConfigError(
                f"{busy} (held by {others[0]}; if that process is dead, its lease ends within {lease.life_s:g} s)",
                Exit.BUSY,
            )
        time.sleep(random.uniform(0.2, 1.5))


def _renew(lease: Lease, began: float, done: threading.Event, lost: threading.Event) -> None:
    """Renew a lease, which was written at `began`, until the end; when it is lost, interrupt the process as SIGTERM does."""
    renewed = began
    while not done.wait(lease.life_s / 4):
        tried, there = time.monotonic(), True
        try:
            there = tried - renewed < lease.life_s and lease.exists()
            if there:
                lease.renew()
        except OSError as error:
            log.warning(f"the lease of {lease.uri} was not renewed ({error})")
            tried = renewed
        # A renewal that took effect after the lease had ended is none: somebody else may have taken it in between.
        there = there and time.monotonic() - renewed < lease.life_s
        renewed = tried
        if not there and not done.is_set():
            _lost.add(lease.uri)
            lost.set()
            os.kill(os.getpid(), signal.SIGTERM)
            return
