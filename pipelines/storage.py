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
the own lease and of the other one), so clocks of machines do not count. A driver whose lease was lost is interrupted. It
writes no more, and neither do its train workers, which look for the object of the lease before they upload or delete; only an
upload that has begun by then may still end.
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
from dataclasses import dataclass
from pathlib import Path

from kforcing.remote import (
    THREADS,
    RemoteError,
    address,
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
MARKS = ("manifest.json", "stage.json", "config.json", "latest.json", "conventions.json")
"""Files that say that others are there: a folder is removed without them first."""


@dataclass
class Hold:
    """A lease by which this process may write below a URI."""

    lease: str
    """URI of its object."""
    ends: float | None
    """Time of `_clock` when it ends; None in a worker, which looks for the object."""

    def valid(self) -> bool:
        """Whether nobody else can have the lease."""
        if self.ends is not None:
            return _clock() < self.ends
        system, path = open_uri(self.lease)
        return bool(retried(self.lease, lambda: system.get_file_info(path)).is_file)


_holds: dict[str, Hold] = {}
"""By the URI of a folder."""


def _clock() -> float:
    """Seconds that pass while the machine is suspended, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def lease_of(path: Path | str) -> str | None:
    """URI of the object of the lease by which this process may write to a path or URI; for `adopt`."""
    return next((hold.lease for root, hold in _holds.items() if address(path).startswith(f"{root}/")), None)


def adopt(lease: str | None) -> None:
    """Write below the folder of a lease only while its object is there; for workers of the driver that holds it."""
    if lease:
        _holds[lease.rpartition("/lease/")[0]] = Hold(lease, None)


def _check(uri: str) -> None:
    """Raise RemoteError when a URI is below a folder whose lease is lost."""
    for root, hold in _holds.items():
        if uri.startswith(f"{root}/") and not hold.valid():
            raise RemoteError(f"{uri} is not written: the lease of the run directory is lost")


def push(path: Path, last: str | None = None) -> None:
    """Upload a file of a copy, or all files of a folder of it, the one named `last` at the end; other paths are left alone.

    Raises RemoteError when that fails, or when the lease of the run directory is lost.
    """
    if uri_of(path) is None:
        return
    if not path.is_dir():
        return upload(path, path)
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(push, [file for file in files if file != path / (last or "")]))
    if last:
        push(path / last)


def upload(file: Path, path: Path) -> None:
    """Upload a file as the object whose copy has a path; it may be another file, whose content does not change meanwhile."""
    uri = uri_of(path)
    assert uri, "in object storage"
    _check(uri)
    system, target = open_uri(uri)

    def copy() -> None:
        copy_whole(None, str(file), system, target, file.stat().st_size)
        if file == path:
            stamp(path, system.get_file_info(target))

    retried(uri, copy)


def remove(path: Path) -> None:
    """Remove a folder, and its objects when it is the copy of a URI, `MARKS` first; nothing when it is not there."""
    if uri := uri_of(path):
        _check(uri)
        for name in [name for name in listing(uri) if name.rpartition("/")[2] in MARKS]:
            _delete(f"{uri}/{name}")
        system, target = open_uri(uri)
        with suppress(FileNotFoundError):
            retried(uri, lambda: system.delete_dir(target))
    shutil.rmtree(path, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Remove a file, and its object when it is the copy of one; nothing when it is not there."""
    if uri := uri_of(path):
        _check(uri)
        _delete(uri)
    path.unlink(missing_ok=True)


def _delete(uri: str) -> None:
    system, path = open_uri(uri)
    with suppress(FileNotFoundError):
        retried(uri, lambda: system.delete_file(path))


def move(old: Path, new: Path) -> None:
    """Rename a folder. Of the copy of a URI all objects are copied, `MARKS` last, before the first is deleted."""
    if (uri := uri_of(old)) and (to := uri_of(new)):
        _check(uri)
        system, _ = open_uri(uri)

        def copy(name: str, size: int) -> None:
            (_, source), (_, target) = open_uri(f"{uri}/{name}"), open_uri(f"{to}/{name}")
            if size > MOST_COPIED:
                retried(uri, lambda: copy_whole(system, source, system, target, size))
            else:
                retried(uri, lambda: system.copy_file(source, target))

        found = listing(uri)
        for name in sorted(found, key=lambda name: name in MARKS):
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
        self.place = f"{uri}/lease/{self.name}"
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
                    _delete(f"{self.uri}/lease/{name}")
        return alive

    def give_up(self) -> None:
        """Delete the object. When that fails, the lease ends by itself."""
        with suppress(RemoteError):
            _delete(self.place)


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
    hold = _holds[uri] = Hold(lease.place, _take(lease, busy, wait) + life_s)
    done = threading.Event()
    threads = [threading.Thread(target=f, args=(lease, hold, done), daemon=True) for f in (_renew, _watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException:
        if not hold.valid():
            raise ConfigError(
                f"the lease of {uri} is lost: it could not be renewed for {life_s:g} s, or another run has taken it. Nothing "
                "more is written there. Run the same command to continue when no other run does",
                Exit.BUSY,
            ) from None
        raise
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=life_s)
        lease.give_up()
        if hold.valid():
            del _holds[uri]


def _take(lease: Lease, busy: str, wait: bool) -> float:
    """Write a lease until it is the only one, `CLAIMS` times or without end; returns the time at which it was written."""
    claims = 0
    while True:
        began = _clock()
        try:
            lease.renew()
            others = lease.others()
        except BaseException:
            lease.give_up()
            raise
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


def _renew(lease: Lease, hold: Hold, done: threading.Event) -> None:
    """Renew a lease until the end. One that has ended, or whose object is gone, is not renewed: others may have taken it."""
    while not done.wait(lease.life_s / 4):
        try:
            tried = _clock()
            there = lease.exists()
            if there and hold.valid() and not done.is_set():
                lease.renew()
            # A renewal that took effect after the lease had ended is none.
            hold.ends = tried + lease.life_s if there and hold.valid() else 0.0
        except Exception as error:
            log.warning(f"the lease of {lease.uri} was not renewed ({error})", extra={"kept": True})
        if not hold.valid():
            return


def _watch(lease: Lease, hold: Hold, done: threading.Event) -> None:
    """Interrupt the process as SIGTERM does when its lease has ended, whatever the thread that renews it waits for."""
    while not done.wait(lease.life_s / 20):
        if not hold.valid():
            hold.ends = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            return
