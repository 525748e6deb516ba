"""What HTTP and Serve cost: the same closed loop on the bare engine and through the endpoint, in one run.

    python -m serve.overhead [--model DIR] [--slots 16] [--tokens 64] [--requests 64]

Without --model: 110 M parameters, random weights, k = 4. Each client has one request at a time; by default there are as
many as slots. Streams and whole answers are measured apart. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

READ = 2**16


def bare(model: str, slots: int, tokens: int, prompts: list[list[int]]) -> float:
    """Tokens a second of the engine alone, kept full until the last requests."""
    from kforcing.engine import Engine, EngineConfig, Request
    from kforcing.loading import load_model

    engine = Engine(load_model(model), EngineConfig(max_num_seqs=slots, max_model_len=len(prompts[0]) + tokens))
    engine.generate([Request(prompts[0], 8)])
    waiting = [Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)]
    before, start = engine.stats.tokens, time.perf_counter()
    engine.generate(waiting)
    return (engine.stats.tokens - before) / (time.perf_counter() - start)


async def through_http(
    url: str, clients: int, tokens: int, prompts: list[list[int]], stream: bool = True
) -> dict[str, Any]:
    """Tokens a second and latencies of clients with one request at a time each."""
    queue = list(enumerate(prompts))
    first_chunks: list[float] = []
    gaps: list[float] = []
    whole: list[float] = []
    made = 0

    async def client() -> None:
        nonlocal made
        while queue:
            seed, prompt = queue.pop(0)
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
            if stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            start = last = time.perf_counter()
            chunks = 0
            async for event in post(url, body):
                now = time.perf_counter()
                if "usage" in event:
                    made += event["usage"]["completion_tokens"]
                else:
                    (gaps if chunks else first_chunks).append(now - last)
                    last, chunks = now, chunks + 1
            whole.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    latencies = (
        {"first_chunk_s": statistics.median(first_chunks), "between_chunks_s": statistics.median(gaps)}
        if stream
        else {}
    )
    return {
        "tokens_per_s": made / seconds,
        **latencies,
        "request_s": {f"p{p}": _percentile(whole, p) for p in (50, 95, 99)},
    }


async def post(url: str, body: dict[str, Any]):  # type: ignore[no-untyped-def]
    """Events of a completion (one if it is not streamed), over a bare socket: a client that costs next to nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(READ)).decode()}")
    try:
        while line := await reader.readline():
            if line.startswith((b"data: {", b"{")):
                yield json.loads(line.removeprefix(b"data: "))
    finally:
        writer.close()


def _percentile(values: list[float], p: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * p // 100)]


def random_model(folder: Path) -> str:
    """A student around a random model, with a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kforcing import Design, PushForwardLM, SequentialConfig
    from kforcing.backbone import random_llama

    design = Design("sequential", "inverse_cdf", sequential=SequentialConfig(hint_layers=1))
    student = PushForwardLM.from_backbone(random_llama(), 4, design)
    student.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def vocabulary_of(model: str) -> int:
    """Size of a model's vocabulary."""
    config = json.loads((Path(model) / "config.json").read_text())
    return int(config.get("backbone", config)["vocab_size"])


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each request (default %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--context", type=int, default=32, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--clients", type=int, help="at a time (default: as many as slots)")
    parser.add_argument("--cpus", type=float, default=2, help="threads of the engine (default %(default)s)")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or random_model(Path(folder))
        prompts = torch.randint(0, vocabulary_of(model), (given.requests, given.context), generator=generator).tolist()
        if given.bare:
            print(bare(model, given.slots, given.tokens, prompts))
            return
        record = measure(model, given, prompts)
    print(json.dumps(record))


def measure(model: str, given: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """The endpoint between two runs of the bare engine, so that a machine that drifts shows."""
    # Serve's own switch for less work a message; its direct ingress would need another proxy.
    os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    import ray
    from ray import serve

    from serve.app import build

    own = [word for word in sys.argv[1:] if not word.startswith("--model=")]
    command = [sys.executable, "-m", "serve.overhead", *own, "--bare", f"--model={model}"]

    def run_bare() -> float:
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    before = run_bare()
    ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False)
    try:
        settings = {
            "model": model,
            "max_num_seqs": given.slots,
            "max_model_len": given.context + given.tokens,
            "teacher": "none",
        }
        clients = given.clients or given.slots
        serve.run(build(settings | {"cpus": given.cpus, "max_waiting": clients}))
        url = "http://127.0.0.1:8000"
        asyncio.run(through_http(url, clients, 8, prompts[:clients]))
        memory = [replica_megabytes()]
        streams = asyncio.run(through_http(url, clients, given.tokens, prompts))
        memory.append(replica_megabytes())
        delivery = _delivery(url)
        whole = asyncio.run(through_http(url, clients, given.tokens, prompts, stream=False))
        memory.append(replica_megabytes())
    finally:
        serve.shutdown()
        ray.shutdown()
    after = run_bare()
    alone = (before + after) / 2
    ratios = {name: figures["tokens_per_s"] / alone for name, figures in (("streams", streams), ("whole", whole))}
    print(
        f"bare engine {before:,.0f} and {after:,.0f} tokens/s; {clients} clients through HTTP: streams "
        f"{streams['tokens_per_s']:,.0f} ({ratios['streams']:.2f}×), whole answers {whole['tokens_per_s']:,.0f} "
        f"({ratios['whole']:.2f}×); from a step's end to its chunk {delivery * 1e3:.1f} ms (median); requests p50 "
        f"{streams['request_s']['p50']:.2f} s, p99 {streams['request_s']['p99']:.2f} s; memory of the replica "
        + " → ".join(f"{m:,.0f}" for m in memory)
        + " MB"
    )
    return {
        "bare_tokens_per_s": [before, after],
        "ratio": ratios,
        "step_to_chunk_s": delivery,
        "streams": streams,
        "whole": whole,
        "replica_mb": memory,
    }


def replicas() -> list[int]:
    """Process ids of the replicas of this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(folder.name))
    return found


def replica_megabytes() -> float:
    """Resident memory of the replicas of this machine."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in replicas())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _delivery(url: str) -> float:
    """Median of the seconds from the end of a step to its chunk, as far as the histogram's buckets tell."""
    name = "kforcing_step_to_chunk_seconds_bucket{"
    counts: dict[float, float] = {}
    for line in urlopen(f"{url}/metrics").read().decode().splitlines():
        if line.startswith(name):
            edge = float(line.split('le="')[1].split('"')[0])
            counts[edge] = counts.get(edge, 0.0) + float(line.split()[-1])
    half, low, below = max(counts.values()) / 2, 0.0, 0.0
    for edge in sorted(counts):
        if counts[edge] >= half:
            return low + (edge - low) * (half - below) / max(counts[edge] - below, 1.0)
        low, below = edge, counts[edge]
    return low


if __name__ == "__main__":
    main()
