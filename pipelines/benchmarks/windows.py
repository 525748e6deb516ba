"""Windows a second of training: rolled-out windows against windows of the text itself, in one process.

    python -m pipelines.benchmarks.windows                    SmolLM2-135M-Instruct (`make .venv/.gguf`), 2 × 256 tokens
    python -m pipelines.benchmarks.windows --model random     a 110 M-parameter model with random weights

A *window* is a place in a text where k tokens are trained. Rolled-out windows need k coupled steps of the teacher, whose 32
likeliest tokens are the labels; a text is its own target, and the trunk's pass over it holds the labels. Each way makes a
batch and its gradients; ways take turns. Medians over the rounds [smallest, largest]; FLOPs are counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.attention.windows import Windows
from kforcing.backbone import load_ar, random_llama
from kforcing.coupling import COUPLINGS
from kforcing.distillation.steps import StudentStep, WindowBatch
from kforcing.distillation.teachers import ARTeacher
from kforcing.distillation.text import TextBatch, TextStep
from kforcing.loading import locate_model
from kforcing.metrics.flops import flop_counter
from kforcing.noise import window_noise

LABELS = 32


def ways(student: PushForwardLM, rows: int, tokens: int, seed: int = 0) -> dict[str, Callable[[], Any]]:
    """Name → one batch and its gradients, for the same windows of the same random text."""
    generator, k = torch.Generator().manual_seed(seed), student.k
    text = torch.randint(0, student.backbone.config.vocab_size, (rows, tokens), generator=generator)
    anchors = torch.arange(tokens - k).expand(rows, -1)
    noise = window_noise(seed, torch.arange(rows), anchors, k)
    windows = Windows(text, anchors, noise, torch.ones(rows))
    teacher = ARTeacher(student.backbone, COUPLINGS[student.design.coupling])
    soft = StudentStep(student, "soft")

    def rolled_out() -> Any:
        targets, labels = teacher.labelled_rollout(windows, LABELS)
        return soft(WindowBatch(windows, targets, labels)).loss.backward()

    def on_text(sampled: int) -> Callable[[], Any]:
        step = TextStep(student, "kl", sampled)
        return lambda: step(TextBatch(text, anchors, noise)).loss.backward()

    return {
        "rolled out, 32 labels": rolled_out,
        "text, whole vocabulary": on_text(0),
        "text, 2,048 sampled tokens": on_text(2048),
    }


def measure(run: dict[str, Callable[[], Any]], windows: int, rounds: int) -> list[dict[str, Any]]:
    """Windows a second of each way, its ratio to the first, and GFLOPs a window."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    flops = {}
    for name, step in run.items():
        with flop_counter() as counter:
            step()
        flops[name] = counter.get_total_flops() / windows
    for _ in range(rounds):
        for name, step in run.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(run))
    return [
        {
            "way": name,
            "windows_per_s": windows / statistics.median(taken),
            "low": windows / max(taken),
            "high": windows / min(taken),
            "ratio": statistics.median(a / b for a, b in zip(seconds[first], taken, strict=True)),
            "gflop_a_window": flops[name] / 1e9,
        }
        for name, taken in seconds.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, hub id, smollm2 or random")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    backbone = random_llama() if given.model == "random" else load_ar(*locate_model(given.model))
    design = Design("sequential", "gumbel", sequential=SequentialConfig(hint_layers=1))
    student = PushForwardLM.from_backbone(backbone, 4, design)
    rows = measure(ways(student, given.rows, given.tokens), given.rows * (given.tokens - student.k), given.rounds)
    print("| way | windows/s | against rolled-out | GFLOP a window |\n|---|---|---|---|")
    for r in rows:
        spread = f"{r['windows_per_s']:.0f} [{r['low']:.0f}, {r['high']:.0f}]"
        print(f"| {r['way']} | {spread} | {r['ratio']:.2f}× | {r['gflop_a_window']:.2f} |")


if __name__ == "__main__":
    main()
