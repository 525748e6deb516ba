"""What a training step of a student costs: blocks read by staircase attention against one pass under a dense mask.

    python -m pipelines.benchmarks.training                          12 × 768, N = 512, k = 4, every window
    python -m pipelines.benchmarks.training --device cuda            the same in bf16 at N = 1024
    python -m pipelines.benchmarks.training --layers 2 --width 64 --heads 2 --context 64 --vocabulary 500    in seconds

Physics. With W = N windows of k hints a step passes N (1 + k) entries through every matrix, whatever the attention. The
dense mask adds N² (1 + k)² scores a head and layer and computes them all, seen or not: it grows with k². The staircase
computes N² (1 + k) / 2 of them and k (k + 1) / 2 a window, so a step is a context pass plus k equal parts. Logits are
N · k · V numbers, and the loss holds several copies of them unless they are made in chunks, each with its gradients at once
(`kforcing.chunking.loss_in_chunks`). A step is arithmetic almost alone, so its roofline is what a large
square matrix product reaches in the same type on the same device; FLOPs are counted on the real code, where the causal
kernels of GPUs count whole though they leave out half.

A step is: context pass, blocks, LM head and loss of K-Forcing's read-out, backward, AdamW (at a learning rate of 0, so
that all rows see the same weights and must agree on the loss). Rows take turns within a round, so that a machine that
slows down slows all of them; medians over rounds [smallest, largest], after one round that counts operations. Peak memory is
that of a process which makes two steps and computes layers again in their backward passes: the largest resident set on a CPU
(weights, optimiser, interpreter and libraries included), the most memory torch allocated on a GPU. On a CPU timed
steps keep freed memory as train workers do (`cluster.MALLOC`), and processes whose peak is measured give it back, so that
their peak is what was in use. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kforcing import PushForwardLM
from kforcing.attention.windows import Windows
from kforcing.backbone import embeddings, lm_head
from kforcing.chunking import checkpoint_layers
from kforcing.device import peak_gpu_mb, peak_rss_mb
from kforcing.distillation.losses import target_nll
from kforcing.distillation.steps import StudentStep, WindowBatch
from kforcing.metrics.flops import flop_counter
from kforcing.noise import window_noise
from kforcing.readout.argmax import ArgmaxReadout
from kforcing.reference import dense_states
from pipelines.runs.cluster import MALLOC
from pipelines.tables import spread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bench:
    """A student with random weights, its optimiser and one batch of full windows."""

    def __init__(self, given: argparse.Namespace, k: int, vocabulary: int):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=given.width,
            num_hidden_layers=given.layers,
            num_attention_heads=given.heads,
            intermediate_size=given.width * 8 // 3,
            max_position_embeddings=given.context + k,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        backbone = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.student = PushForwardLM.from_backbone(backbone, k).to(given.device, DTYPES[given.dtype]).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0)
        self.device, self.context, self.batch = torch.device(given.device), given.context, given.batch
        self.tokens = torch.randint(0, vocabulary, (given.batch, given.context + k))

    def windows(self, k: int) -> WindowBatch:
        """Every window of the batch, with the k tokens that follow it as targets."""
        anchors_BW = torch.arange(self.context).expand(self.batch, -1)
        noise = window_noise(0, torch.arange(self.batch), anchors_BW, k)
        targets = self.tokens.unfold(1, k, 1)[:, 1 : self.context + 1]
        parts = self.tokens[:, : self.context], anchors_BW, noise, torch.ones(self.batch)
        return WindowBatch(Windows(*(x.to(self.device) for x in parts)), targets.to(self.device))

    def step(self, loss: Callable[[WindowBatch], Tensor], batch: WindowBatch) -> tuple[float, float]:
        """One training step: (seconds, loss a token)."""
        self._wait()
        start = time.perf_counter()
        value = loss(batch) / batch.target_tokens
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - start, value.item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def staircase(self, chunk: int) -> Callable[[WindowBatch], Tensor]:
        """The loss as training computes it."""
        step = StudentStep(self.student, "hard", chunk)
        return lambda batch: step(batch).loss

    def at_once(self, batch: WindowBatch) -> Tensor:
        """The same loss from all logits at once, its gradients left to the backward pass."""
        scores = self.student.scores(batch.windows, batch.targets_BWK)
        return target_nll(scores.logits_BWKV, batch.targets_BWK).sum()

    def dense(self, batch: WindowBatch) -> Tensor:
        """That from one pass over context and blocks."""
        backbone, readout, windows = self.student.backbone, self.student.readout, batch.windows
        assert isinstance(readout, ArgmaxReadout)
        hints = readout.noise_encoder(windows.noise_BWK, torch.ones_like(windows.noise_BWK))
        context = embeddings(backbone)(windows.context_BN)
        states = dense_states(backbone.base_model, context, windows.anchors_BW, hints)
        return target_nll(lm_head(backbone, states), batch.targets_BWK).sum()


def alternate(rows: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, loss and FLOPs of each row: a round runs each once, the first only counts operations."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    counted = {}
    for name, row in rows.items():
        with flop_counter() as counter:
            _, loss = row()
        counted[name] = {"loss": loss, "flops": counter.get_total_flops()}
    for number in range(1, rounds + 1):
        for name, row in rows.items():
            taken, _ = row()
            print(f"round {number} of {rounds}  {name:<28}{taken:>8.2f} s", file=sys.stderr, flush=True)
            seconds[name].append(taken)
    return {name: {**spread(values), **counted[name]} for name, values in seconds.items()}


def matmul_flops_per_s(given: argparse.Namespace) -> float:
    """What a large square matrix product reaches."""
    from pipelines.benchmarks.decoding.hardware import measure_hardware

    return measure_hardware(torch.device(given.device), DTYPES[given.dtype]).flops_per_s


def steps(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A whole step, three ways."""
    bench = Bench(given, given.k, given.vocabulary)
    batch = bench.windows(given.k)
    rows = {
        "staircase": lambda: bench.step(bench.staircase(given.chunk), batch),
        "staircase, logits at once": lambda: bench.step(bench.at_once, batch),
        "dense mask, logits at once": lambda: bench.step(bench.dense, batch),
    }
    return alternate(rows, given.rounds)


def by_k(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a window of a whole step for each k, and how far they are from a straight line."""
    bench = Bench(given, max(given.ks), given.vocabulary)

    def row(k: int) -> Callable[[], tuple[float, float]]:
        batch = bench.windows(k)
        return lambda: bench.step(bench.staircase(given.chunk), batch)

    seconds = alternate({str(k): row(k) for k in given.ks}, given.rounds)
    windows = given.batch * given.context
    ms = {k: {name: 1e3 * s[name] / windows for name in ("median", "min", "max")} for k, s in seconds.items()}
    return {"ms_per_window": ms, **line(given.ks, [m["median"] for m in ms.values()])}


def line(ks: list[int], values: list[float]) -> dict[str, float]:
    """The straight line through values over k, and the largest deviation from it, relative to the value."""
    slope, start = np.polyfit(ks, values, 1) if len(ks) > 1 else (0.0, values[0])
    off = max(abs(start + slope * k - v) / v for k, v in zip(ks, values, strict=True))
    return {"per_k": float(slope), "at_0": float(start), "largest_deviation": float(off)}


def peak_mb(given: argparse.Namespace) -> float:
    """Make two steps of recomputed layers, and say how much memory this process has needed at most, in MiB.

    Two, since AdamW's moments exist from the end of the first on.
    """
    given.batch = given.memory_batch
    bench = Bench(given, given.k, given.memory_vocabulary)
    checkpoint_layers(bench.student)
    loss = bench.staircase(given.chunk) if given.peak == "chunked" else bench.at_once
    for _ in range(2):
        bench.step(loss, bench.windows(given.k))
    return peak_gpu_mb() if bench.device.type == "cuda" else peak_rss_mb()


def memory(words: list[str]) -> dict[str, float]:
    """Peak memory of a step with a large vocabulary, each way in a process of its own."""
    peaks = {}
    for way in ("chunked", "at once"):
        line = [sys.executable, "-m", "pipelines.benchmarks.training", *words, "--peak", way]
        plain = {name: value for name, value in os.environ.items() if name not in MALLOC}
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=plain)
        print(f"peak memory, logits {way:<8} {done.stdout.split()[-1]} MiB", file=sys.stderr, flush=True)
        peaks[way] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def describe(record: dict[str, Any]) -> str:
    """The tables, for people."""
    size, rows, ks, peaks = record["model"], record["step"], record["by_k"], record["peak_mb"]
    peak = record["matmul_flops_per_s"]
    lines = [
        f"{size}; batch {record['batch']}, N = {record['context']}, {record['dtype']} on {record['device']}, "
        f"{record['threads']} threads; torch {record['torch']}, transformers {record['transformers']}",
        f"a large matrix product makes {peak / 1e9:,.0f} GFLOP/s",
        f"\n{'step, k = ' + str(record['k']):<28}{'seconds':>9}{'':<20}{'relative':>9}{'tokens/s':>11}{'GFLOP/s':>10}"
        f"{'of peak':>9}{'loss':>12}",
    ]
    fastest = rows["staircase"]["median"]
    for name, s in rows.items():
        between = f" [{s['min']:.2f}, {s['max']:.2f}]"
        rate, tokens = s["flops"] / s["median"], record["batch"] * record["context"] * record["k"]
        lines.append(
            f"{name:<28}{s['median']:>9.2f}{between:<20}{s['median'] / fastest:>8.2f}×{tokens / s['median']:>11,.0f}"
            f"{rate / 1e9:>10,.0f}{rate / peak:>9.0%}{s['loss']:>12.6f}"
        )
    lines.append(f"\n{'k':<6}{'ms a window':>12}")
    lines += [f"{k:<6}{s['median']:>12.3f} [{s['min']:.3f}, {s['max']:.3f}]" for k, s in ks["ms_per_window"].items()]
    lines.append(
        f"a line of {ks['at_0']:.3f} + {ks['per_k']:.3f} k ms, from which no k is farther than {ks['largest_deviation']:.1%}"
    )
    if peaks:
        lines.append(
            f"\npeak memory of a step, vocabulary {record['memory_vocabulary']:,}, batch {record['memory_batch']}, layers "
            "computed again in the backward pass, MiB"
        )
        whole = peaks["at once"]
        lines += [f"logits {way:<12}{mb:>10,.0f}{mb / whole:>9.2f}×" for way, mb in peaks.items()]
    return "\n".join(lines)


def read_options(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--memory-vocabulary", type=int, default=50_000, help="of the steps whose memory is measured")
    parser.add_argument("--context", type=int, help="tokens of context (default 512, on a GPU 1024)")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step (default %(default)s)")
    parser.add_argument("--memory-batch", type=int, default=6, help="of the steps whose memory is measured (default 6)")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--ks", type=lambda s: [int(k) for k in s.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--chunk", type=int, default=1024, help="tokens whose logits exist at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default fp32, on a GPU bf16")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--peak", choices=["chunked", "at once"], help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    gpu = given.device.startswith("cuda")
    given.context, given.dtype = given.context or (1024 if gpu else 512), given.dtype or ("bf16" if gpu else "fp32")
    return given


def main() -> None:
    """Read the command line, measure, print."""
    words = sys.argv[1:]
    given = read_options(words)
    if not MALLOC.keys() <= os.environ.keys() and not given.peak:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    if given.peak:
        print(json.dumps(peak_mb(given)))
        return
    record = {
        "model": f"random Llama of {given.layers} × {given.width}, {given.heads} heads, vocabulary {given.vocabulary:,}",
        **{
            name: getattr(given, name)
            for name in ("batch", "context", "k", "chunk", "dtype", "device", "memory_vocabulary", "memory_batch")
        },
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_flops_per_s": matmul_flops_per_s(given),
        "step": steps(given),
        "by_k": by_k(given),
        "peak_mb": {} if given.no_memory else memory(words),
    }
    print(describe(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
