"""What is read of processes, and of the answers of an endpoint, when it is measured."""

import asyncio
import os
import subprocess
import sys

from serve import processes
from serve.load_client import Exchange


def test_a_process_that_ends_while_it_is_read_counts_nothing(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(processes, "_family", lambda: [ended.pid, os.getpid()])
    monkeypatch.setattr(processes, "replicas", lambda: [ended.pid, os.getpid()])
    assert set(processes.cpu_seconds()) <= {"client", "engine"}
    assert processes.cpu_seconds()["client"] > 0
    assert processes.replica_megabytes() > 1


def test_every_event_of_a_stream_is_counted_however_the_bytes_come():
    async def counts():
        exchange, found = Exchange(b""), []
        for data in (b"HTTP/1.1 200 OK\r\n\r\nda", b'ta: {"a": 1}\n\n', b"data: {}\n\ndata: {}\n\ndata: ", b"[DONE]"):
            exchange.data_received(data)
            found.append(len(exchange.chunks))
        return found

    assert asyncio.run(counts()) == [0, 1, 3, 3]
