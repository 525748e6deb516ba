"""Measure what HTTP and Ray Serve cost: the same load on the bare engine and through the endpoint, in turn.

    python -m serve.overhead [--model DIR] [--max-num-seqs 16] [--tokens 64] [--requests 64] [--rounds 3] [--proxy python]

Without --model, a student with 110 M parameters, random weights and k = 4 is measured. Each client has one request at a time;
by default there are as many clients as the engine runs requests at once. Streams and whole answers are measured separately.
Each round stands between two runs of the bare engine: if the two differ, the machine's speed has drifted. Clients, proxy and
engine share the machine, so the record has the CPU time of each, and a ratio without the time that the clients took.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
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

from serve.load_client import through_http
from serve.processes import cpu_seconds, replica_megabytes

URL = "http://127.0.0.1:8000"
PHASES = ("streams", "whole")
PROXIES = {
    "python": {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"},
    "haproxy": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    },
}
"""What Ray Serve's environment says for each of its proxies."""
KINDS = ("engine", "replica", "proxy", "ray", "client")


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
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken (default %(default)s)")
    parser.add_argument("--proxy", choices=PROXIES, default="python", help="of Ray Serve (default %(default)s)")
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
    """All rounds, and the medians of their ratios to the bare engine's tokens per second."""
    # Ray Serve's own switch for less work per message; and replicas get as much of a busy machine as the bare engine.
    os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_worker_niceness": "0", **PROXIES[given.proxy]}
    own = [word for word in sys.argv[1:] if not word.startswith("--model=")]
    command = [sys.executable, "-m", "serve.overhead", *own, "--bare", f"--model={model}"]

    def run_bare() -> float:
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    bare, rounds = [run_bare()], []
    for _ in range(given.rounds):
        rounds.append(_measure_endpoint(model, given, prompts))
        bare.append(run_bare())
        for name in PHASES:
            phase = rounds[-1][name]
            phase["ratio"] = phase["tokens_per_s"] / statistics.mean(bare[-2:])
            phase["ratio_without_client"] = phase["ratio"] / (1 - phase["client_share"])
    ratios = {
        key: {name: statistics.median(each[name][key] for each in rounds) for name in PHASES}
        for key in ("ratio", "ratio_without_client")
    }
    return {"bare_tokens_per_s": bare, "clients": given.clients or given.max_num_seqs, **ratios, "rounds": rounds}


def _measure_endpoint(model: str, given: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Deploy the model with one replica, and send it streams and whole answers."""
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
        serve.start(http_options={"host": "127.0.0.1", "port": 8000})
        serve.run(build(settings))
        asyncio.run(through_http(URL, clients, 8, prompts[:clients]))
        return {
            "streams": _phase(clients, given.tokens, prompts, stream=True),
            "step_to_chunk_s": _median_delivery(),
            "whole": _phase(clients, given.tokens, prompts, stream=False),
            "replica_mb": replica_megabytes(),
        }
    finally:
        serve.shutdown()
        ray.shutdown()


def _phase(clients: int, tokens: int, prompts: list[list[int]], stream: bool) -> dict[str, Any]:
    """What the clients saw, and where the time went: CPU by process, and the engine's own counters."""
    cpu, engine = cpu_seconds(), _counters()
    record = asyncio.run(through_http(URL, clients, tokens, prompts, stream))
    cpu = {kind: seconds - cpu.get(kind, 0.0) for kind, seconds in cpu_seconds().items()}
    engine = {name: value - engine.get(name, 0.0) for name, value in _counters().items()}
    thousands = len(prompts) * tokens / 1000
    cores = len(os.sched_getaffinity(0))
    return record | {
        "client_share": cpu["client"] / (record["seconds"] * cores),
        "cpu_s_per_1000_tokens": {kind: seconds / thousands for kind, seconds in cpu.items()},
        "tokens_per_engine_step": len(prompts) * tokens / engine["engine_steps_total"],
        "engine_s_per_1000_tokens": engine["engine_time_seconds_total"] / thousands,
        "between_steps_s_per_1000_tokens": engine["framework_time_seconds_total"] / thousands,
    }


def _counters() -> dict[str, float]:
    """The endpoint's counters and histograms by name, without their labels."""
    found = {}
    for line in urlopen(f"{URL}/metrics").read().decode().splitlines():
        if line.startswith("kforcing_"):
            found[line.removeprefix("kforcing_").partition("{")[0]] = float(line.split()[-1])
    return found


def _summary(record: dict[str, Any]) -> str:
    """The result in some lines."""
    lines = [
        f"bare engine {', '.join(f'{rate:,.0f}' for rate in record['bare_tokens_per_s'])} tokens/s; "
        f"{record['clients']} clients through HTTP, medians of {len(record['rounds'])} rounds:"
    ]
    for name in PHASES:
        rounds = [each[name] for each in record["rounds"]]
        middle = {key: statistics.median(each[key] for each in rounds) for key in ("tokens_per_s", "client_share")}
        cpu = {kind: statistics.median(r["cpu_s_per_1000_tokens"].get(kind, 0.0) for r in rounds) for kind in KINDS}
        lines.append(
            f"{name}: {middle['tokens_per_s']:,.0f} tokens/s, {record['ratio'][name]:.3f}× "
            f"(without the clients' {middle['client_share']:.1%} of the CPUs {record['ratio_without_client'][name]:.3f}×); "
            f"CPU s per 1,000 tokens: {', '.join(f'{kind} {seconds:.3f}' for kind, seconds in cpu.items())}"
        )
    last = record["rounds"][-1]
    delivery, megabytes = last["step_to_chunk_s"] * 1e3, last["replica_mb"]
    lines.append(f"from a step's end to its chunk {delivery:.1f} ms (median); the replica has {megabytes:,.0f} MB")
    return "\n".join(lines)


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
