"""The processes of the Ray cluster that this process has started: which are replicas, their memory, and who used the CPU."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from glob import glob
from pathlib import Path

from serve.engine_thread import THREAD_NAME

TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {
    b"ray::ServeReplica": "replica",
    b"ray::ProxyActor": "proxy",
    b"ray::HAProxyManager": "proxy",
    b"haproxy": "proxy",
}
"""What a process is, by how its command begins (of a program, by its file name)."""


def replicas() -> list[int]:
    """Process ids of the replicas."""
    return [pid for pid in _family() if _kind(pid) == "replica"]


def replica_megabytes() -> float:
    """Resident memory of the replicas, in MB."""
    pages = 0
    for pid in replicas():
        with contextlib.suppress(OSError):  # it has ended
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds() -> dict[str, float]:
    """CPU seconds that these processes have used so far: `client` (this process), `proxy`, `engine` (the threads of the
    replicas that run models), `replica` (their other threads) and `ray` (everything else)."""
    seconds: dict[str, float] = defaultdict(float)
    for pid in _family():
        for thread in glob(f"/proc/{pid}/task/*"):  # none where the process has ended
            with contextlib.suppress(OSError):
                name, fields = _stat(Path(thread))
                kind = "engine" if name == THREAD_NAME else _kind(pid)
                seconds[kind] += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def _kind(pid: int) -> str:
    """`client`, `replica`, `proxy` or `ray`."""
    if pid == os.getpid():
        return "client"
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2]
        return next((kind for start, kind in KINDS.items() if command.startswith(start)), "ray")
    return "ray"


def _stat(folder: Path) -> tuple[str, list[str]]:
    """The name of a process or thread, and what follows it in its `stat`, from the state on."""
    name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
    return name, rest.split()


def _family() -> list[int]:
    """This process and all below it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                parents[int(folder.name)] = int(_stat(folder)[1][1])
    return [pid for pid in parents if os.getpid() in (pid, *_ancestors(pid, parents))]


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found
