"""Clients that send completions to an endpoint and cost it little CPU: bare sockets, and answers that are not parsed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

EVENT = b"data: {"
TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Load:
    """What the clients of one measurement saw; times in seconds."""

    tokens: int = 0
    first_chunks: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between two events of a stream."""
    requests: list[float] = field(default_factory=list)


class Exchange(asyncio.Protocol):
    """One request on a connection of its own, and the bytes that come back."""

    def __init__(self, request: bytes):
        self.request, self.answer = request, bytearray()
        self.chunks: list[float] = []
        """When events came (`time.perf_counter`)."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Send the request."""
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Note the time, keep the bytes."""
        seen = max(len(self.answer) - len(EVENT) + 1, 0)  # an event may begin at the end of the bytes before
        self.answer += data
        self.chunks += [time.perf_counter()] * self.answer.count(EVENT, seen)

    def connection_lost(self, error: Exception | None) -> None:
        """End the exchange."""
        self.ended.set_exception(error) if error else self.ended.set_result(None)


async def through_http(
    url: str, clients: int, tokens: int, prompts: list[list[int]], stream: bool = True
) -> dict[str, Any]:
    """Tokens per second and latencies; each client has one request at a time until all prompts have been sent.

    Raises RuntimeError for an answer without a count of tokens.
    """
    queue = list(enumerate(prompts))
    load = Load()

    async def client() -> None:
        while queue:
            seed, prompt = queue.pop(0)
            body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
            await _one_request(
                url, body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {}), load
            )

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    medians = {"first_chunk_s": load.first_chunks, "between_chunks_s": load.gaps} if stream else {}
    return {
        "tokens_per_s": load.tokens / seconds,
        "seconds": seconds,
        **{name: statistics.median(values) for name, values in medians.items()},
        "request_s": {f"p{p}": _percentile(load.requests, p) for p in (50, 95, 99)},
    }


async def _one_request(url: str, body: dict[str, Any], load: Load) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    start = time.perf_counter()
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request), host, int(port))
    await exchange.ended
    if not (counts := TOKENS.findall(exchange.answer)):
        raise RuntimeError(f"no tokens in the answer: {exchange.answer[:2000].decode(errors='replace')}")
    load.tokens += int(counts[-1])
    load.requests.append(time.perf_counter() - start)
    if chunks := exchange.chunks:
        load.first_chunks.append(chunks[0] - start)
        load.gaps += [after - before for before, after in itertools.pairwise(chunks)]


def _percentile(values: list[float], p: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * p // 100)]
