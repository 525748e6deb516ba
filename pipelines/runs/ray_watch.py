"""Say when Ray itself has died: its library then ends this process with exit code 1, and says nothing of the GCS."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.log import log

SILENT_S, CONNECT_S = 5.0, 5.0
"""Seconds without an answer after which that is said, and in which a connection must be taken."""


@contextmanager
def saying_when_ray_dies() -> Iterator[None]:
    """Warn when the GCS of the cluster, or the raylet of this node, takes no connection. `ray.init` was called before."""
    done = threading.Event()
    threading.Thread(target=_watch, args=(_services(), done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _services() -> dict[str, str]:
    """Names of the services → HOST:PORT."""
    import ray

    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    raylet = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"
    return {"GCS of the cluster": context.gcs_address, "raylet of this node": raylet}


def _watch(services: dict[str, str], done: threading.Event) -> None:
    """Look once a second, and say once what has become silent."""
    answered = dict.fromkeys(services, time.monotonic())
    while not done.wait(1.0):
        for name, address in services.items():
            before, now = answered[name], time.monotonic()
            if _answers(address):
                answered[name] = now
            elif before + SILENT_S < now:
                answered[name] = float("inf")  # until it answers again
                log.warning(
                    f"the {name} ({address}) does not answer. If it is dead, Ray ends this run within minutes, with exit "
                    "code 1; the same command continues it from the last checkpoint"
                )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
