"""Measure what HTTP and Ray Serve cost: the same load on the bare engine and through the endpoint, in one run.

    python -m serve.overhead [--model DIR] [--max-num-seqs 16] [--tokens 64] [--requests 64]

Without --model, a student with 110 M parameters, random weights and k = 4 is measured. Each client has one request at a time;
by default there are as many clients as the engine runs requests at once. Streams and whole answers are measured separately.
The last line of the output is one JSON object.
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
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

URL = "http://127.0.0.1:8000"


def bare_engine(model: str, max_num_seqs: int, tokens: int, prompts: list[list[int]]) -> float:
    """Tokens per second of the engine alone, with a full batch until the last requests."""
    from kforcing.engine import Engine, EngineConfig, Request
    from kforcing.loading import load_model

    engine = Engine(load_model(model), EngineConfig(max_num_seqs=max_num_seqs, max_model_len=len(prompts[0]) + tokens))
    engine.generate([Request(prompts[0], 8)])
    waiting = [Request(prompt, tokens, seed) for seed, prompt in enumerate(prompts)]
    before, start = engine.stats.tokens, time.perf_counter()
    engine.generate(waiting)
    return (engine.stats.tokens - before) / (time.perf_counter() - start)


@dataclass
class Load:
    """What the clients of one measurement saw; times in seconds."""

    tokens: int = 0
    first_chunks: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between two chunks of a stream."""
    requests: list[float] = field(default_factory=list)


async def through_http(clients: int, tokens: int, prompts: list[list[int]], stream: bool = True) -> dict[str, Any]:
    """Tokens per second and latencies; each client has one request at a time until all prompts have been sent."""
    queue = list(enumerate(prompts))
    load = Load()

    async def client() -> None:
        while queue:
            seed, prompt = queue.pop(0)
            body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "ignore_eos": True}
            await _one_request(
                body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {}), load
            )

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    medians = {"first_chunk_s": load.first_chunks, "between_chunks_s": load.gaps} if stream else {}
    return {
        "tokens_per_s": load.tokens / seconds,
        **{name: statistics.median(values) for name, values in medians.items()},
        "request_s": {f"p{p}": _percentile(load.requests, p) for p in (50, 95, 99)},
    }


async def _one_request(body: dict[str, Any], load: Load) -> None:
    start = last = time.perf_counter()
    chunks = 0
    async for event in post(body):
        now = time.perf_counter()
        if "usage" in event:
            load.tokens += event["usage"]["completion_tokens"]
        else:
            (load.gaps if chunks else load.first_chunks).append(now - last)
            last, chunks = now, chunks + 1
    load.requests.append(time.perf_counter() - start)


async def post(body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a completion (one if it is not streamed), read from a bare socket so that the client costs little."""
    host, _, port = URL.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2**16)).decode()}")
    try:
        while line := await reader.readline():
            if line.startswith((b"data: {", b"{")):
                yield json.loads(line.removeprefix(b"data: "))
    finally:
        writer.close()


def _percentile(values: list[float], p: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * p // 100)]


def save_random(folder: Path, seed: int | None = None, chat_template: str | None = None, **sizes: int) -> str:
    """Save a student with random weights and a tokenizer of numbered words; returns the directory.

    Args:
        seed: of weights by which some tokens are much likelier than others; None for those of an untrained model.
        sizes: settings of `LlamaConfig`, by default those of a model with 110 M parameters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kforcing import Design, PushForwardLM, SequentialConfig
    from kforcing.backbone import random_llama

    design = Design("sequential", "inverse_cdf", sequential=SequentialConfig(hint_layers=1))
    backbone = random_llama(**sizes)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in backbone.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    student = PushForwardLM.from_backbone(backbone, 4, design)
    student.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(backbone.config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


def vocabulary_of(model: str) -> int:
    """The size of a model's vocabulary."""
    config = json.loads((Path(model) / "config.json").read_text())
    return int(config.get("backbone", config)["vocab_size"])


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR")
    parser.add_argument(
        "--max-num-seqs", "--slots", type=int, default=16, help="requests at once (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer (default %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="number of requests (default %(default)s)")
    parser.add_argument("--context", type=int, default=32, help="tokens of each prompt (default %(default)s)")
    parser.add_argument("--clients", type=int, help="number of clients (default: the value of --max-num-seqs)")
    parser.add_argument("--cpus", type=float, default=2, help="threads of the engine (default %(default)s)")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or save_random(Path(folder))
        prompts = torch.randint(0, vocabulary_of(model), (given.requests, given.context), generator=generator).tolist()
        if given.bare:
            print(bare_engine(model, given.max_num_seqs, given.tokens, prompts))
            return
        record = measure(model, given, prompts)
    print(_summary(record))
    print(json.dumps(record))


def measure(model: str, given: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """The endpoint between two runs of the bare engine: if the two differ, the machine's speed has drifted."""
    own = [word for word in sys.argv[1:] if not word.startswith("--model=")]
    command = [sys.executable, "-m", "serve.overhead", *own, "--bare", f"--model={model}"]

    def run_bare() -> float:
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    before = run_bare()
    record = _measure_endpoint(model, given, prompts)
    after = run_bare()
    ratio = {name: record[name]["tokens_per_s"] / ((before + after) / 2) for name in ("streams", "whole")}
    return {"bare_tokens_per_s": [before, after], "ratio": ratio} | record


def _measure_endpoint(model: str, given: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Deploy the model with one replica, and send it streams and whole answers."""
    # Ray Serve's own switch for less work per message; direct ingress would need another proxy.
    os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    import ray
    from ray import serve

    from serve.app import build

    clients = given.clients or given.max_num_seqs
    settings = {
        "model": model,
        "max_num_seqs": given.max_num_seqs,
        "max_model_len": given.context + given.tokens,
        "teacher": "none",
        "acceptance": "fixed",  # as the bare engine
        "cpus": given.cpus,
        "max_waiting": clients,
    }
    ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False)
    try:
        serve.run(build(settings))
        asyncio.run(through_http(clients, 8, prompts[:clients]))
        memory = [replica_megabytes()]
        streams = asyncio.run(through_http(clients, given.tokens, prompts))
        memory.append(replica_megabytes())
        delivery = _median_delivery()
        whole = asyncio.run(through_http(clients, given.tokens, prompts, stream=False))
        memory.append(replica_megabytes())
    finally:
        serve.shutdown()
        ray.shutdown()
    return {
        "clients": clients,
        "step_to_chunk_s": delivery,
        "streams": streams,
        "whole": whole,
        "replica_mb": memory,
    }


def _summary(record: dict[str, Any]) -> str:
    """The result in one line."""
    before, after = record["bare_tokens_per_s"]
    streams, whole, ratio = record["streams"], record["whole"], record["ratio"]
    return (
        f"bare engine {before:,.0f} and {after:,.0f} tokens/s; {record['clients']} clients through HTTP: streams "
        f"{streams['tokens_per_s']:,.0f} tokens/s ({ratio['streams']:.2f}×), whole answers {whole['tokens_per_s']:,.0f} "
        f"tokens/s ({ratio['whole']:.2f}×); from a step's end to its chunk {record['step_to_chunk_s'] * 1e3:.1f} ms "
        f"(median); requests p50 {streams['request_s']['p50']:.2f} s, p99 {streams['request_s']['p99']:.2f} s; memory of the "
        f"replica {' → '.join(f'{m:,.0f}' for m in record['replica_mb'])} MB"
    )


def replicas() -> list[int]:
    """Process ids of the replicas of the Ray cluster that this process has started."""
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                    found.append(int(folder.name))
    return [pid for pid in found if os.getpid() in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found


def replica_megabytes() -> float:
    """Resident memory of these replicas, in MB."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in replicas())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _median_delivery() -> float:
    """Median of the seconds from the end of a step to its chunk, interpolated between the histogram's buckets."""
    name = "kforcing_step_to_chunk_seconds_bucket{"
    counts: dict[float, float] = {}
    for line in urlopen(f"{URL}/metrics").read().decode().splitlines():
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
