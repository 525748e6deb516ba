"""Tokens a second and step latency of the decode engine against `transformers`, in one run, with the physics beside them.

    python pipelines/benchmark.py                                a 12 × 768 model with random weights, k = 1, 2, 4
    python pipelines/benchmark.py --student runs/quickstart/k4   a trained student and the AR model inside its run
    python pipelines/benchmark.py --batch 4,16,128 --context 128,1024 --device cuda --dtype bf16

Every row decodes the same prompts with the same weights. A round gives each row the same number of tokens to make; rows take
turns within a round, so that a machine that slows down slows all of them. Prompts are read before the clock runs. Only
tokens that are returned count: what a block holds beyond an end-of-text does not. *roofline* is the larger of (bytes a
step ÷ this machine's memory bandwidth) and (FLOPs a step ÷ its arithmetic), both measured in this run.

Medians over rounds [smallest, largest]. Writes benchmark.json, .md, .png below --output and logs them to MLflow. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.backbone import random_llama
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.loading import DTYPES
from kforcing.metrics.flops import attention_step, predicted_ar_step, predicted_step

STOCK = "transformers"


@dataclass(frozen=True)
class Row:
    """One way of decoding."""

    name: str
    model: Any
    k: int = 1
    packed: bool | None = None
    invariant: bool = False


@dataclass(frozen=True)
class Machine:
    """What the hardware does at its best."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Point:
    """A row at one batch and context: one figure a round."""

    step_ms: list[float]
    tokens_per_s: list[float]
    roofline_ms: float | None


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Bandwidth of reading memory that no cache holds, and arithmetic of a large matrix product."""
    big = torch.zeros(2**27 if device.type == "cpu" else 2**30, dtype=dtype, device=device)
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    best = {}
    for name, call, amount in (
        ("bytes", lambda: big.sum(), big.nbytes),
        ("flops", lambda: a @ a, 2 * n**3),
    ):
        times = [_timed(call, device) for _ in range(7)]
        best[name] = amount / min(times)
    return Machine(best["bytes"], best["flops"])


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_rows(ks: list[int], device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, list[Row]]:
    """`random_llama` and students around it, all untrained."""
    backbone = random_llama()
    backbone.to(device=device, dtype=dtype)
    most = max(ks)
    paper = PushForwardLM.from_backbone(backbone, most)
    parts = {
        "sequential": SequentialConfig(hint_layers=1),
        "sequential, shortlist 64": SequentialConfig(hint_layers=1, shortlist=64),
        "sequential, shortlist 64, no draft": SequentialConfig(hint_layers=1, shortlist=64, draft="none"),
    }
    students = {
        name: PushForwardLM.from_backbone(backbone, most, Design("sequential", "inverse_cdf", sequential=p))
        for name, p in parts.items()
    }
    rows = [Row("engine, AR", backbone), *(Row(f"engine, paper k={k}", paper, k) for k in ks)]
    rows += [Row(f"engine, {name} k={k}", s, k) for name, s in students.items() for k in ks if k == most]
    if device.type == "cpu":
        rows += [
            Row("stock kernels, AR", backbone, packed=False),
            Row(f"stock kernels, paper k={most}", paper, most, packed=False),
            Row(f"stock kernels, sequential k={most}", students["sequential"], most, packed=False),
        ]
    rows += [Row("batch-invariant, AR", backbone, invariant=True)]
    return backbone, rows


def student_rows(
    path: str, ks: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[Row]]:
    """A trained student, and the AR model inside it or beside it."""
    student = PushForwardLM.from_pretrained(path).to(device, dtype)
    if student.config.design.exact_trunk:
        backbone: Any = student.backbone
    else:
        folder = Path(path).parent / "teacher"
        backbone = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        backbone.to(device=device, dtype=dtype)
    name = student.config.design.readout
    ks = [k for k in ks if k <= student.k]
    return backbone, [Row("engine, AR", backbone), *(Row(f"engine, {name} k={k}", student, k) for k in ks)]


@dataclass(frozen=True)
class Work:
    """What every row of a table has to do."""

    prompts: list[list[int]]
    tokens: int
    """New tokens of each request a round."""
    rounds: int
    eos: int | None


def engine_rounds(row: Row, work: Work, device: torch.device) -> Iterator[tuple[float, float]]:
    """(milliseconds a step, tokens a second) of each round of one row, prompts read before the first."""
    warm = 2 * row.k
    # The first to start runs on while the others' prompts are read.
    reading = len(work.prompts) * row.k * (1 + len(work.prompts[0]) // 256)
    length = len(work.prompts[0]) + reading + warm + work.tokens * (work.rounds + 1) + row.k
    engine = Engine(
        row.model,
        EngineConfig(
            max_num_seqs=len(work.prompts),
            max_model_len=length + 1,
            k=row.k,
            packed=row.packed,
            batch_invariant=row.invariant,
            check_every=1,
            max_num_batched_tokens=256 if row.invariant else 1024,
        ),
    )
    stop = frozenset() if work.eos is None else frozenset([work.eos])
    for i, prompt in enumerate(work.prompts):
        engine.submit(Request(prompt, seed=i, stop_ids=stop))
    while engine.scheduler.prefilling or engine.scheduler.waiting or not engine.stats.steps:
        engine.step()
    engine.step()
    engine.step()
    while True:
        before, steps = engine.stats.tokens, work.tokens // row.k
        seconds = _timed(lambda n=steps: [engine.step() for _ in range(n)], device)  # type: ignore[misc]
        yield seconds / steps * 1e3, (engine.stats.tokens - before) / seconds


class Stamps:
    """A logits processor that leaves logits alone and notes when it is called: once a step."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the time."""
        _wait(self.device)
        self.times.append(time.perf_counter())
        return scores


@torch.inference_mode()
def stock_rounds(backbone: Any, work: Work, device: torch.device) -> Iterator[tuple[float, float]]:
    """The same of `transformers.generate`, sampling; it reads the prompts again each round, outside the clock."""
    ids = torch.tensor(work.prompts, device=device)
    while True:
        stamps = Stamps(device)
        out = backbone.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=work.tokens + 1,
            eos_token_id=work.eos,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([stamps]),
        )
        seconds, steps = stamps.times[-1] - stamps.times[0], len(stamps.times) - 1
        yield seconds / steps * 1e3, _returned(out[:, ids.shape[1] + 1 :].tolist(), work.eos) / seconds


@torch.inference_mode()
def lookup_rounds(backbone: Any, work: Work, device: torch.device, k: int) -> Iterator[tuple[float, float]]:
    """Its prompt-lookup (assisted) decoding: greedy, one sequence, drafts of up to k tokens copied from the prompt."""
    ids = torch.tensor(work.prompts[:1], device=device)

    def generate(n: int) -> tuple[float, int]:
        out: list[Any] = []
        seconds = _timed(
            lambda: out.append(
                backbone.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    prompt_lookup_num_tokens=k,
                    max_new_tokens=n,
                    eos_token_id=work.eos,
                    pad_token_id=0,
                )
            ),
            device,
        )
        return seconds, _returned(out[0][:, ids.shape[1] :].tolist(), work.eos)

    while True:
        (short, few), (long, many) = generate(1), generate(work.tokens + 1)
        yield (long - short) / max(many - few, 1) * 1e3, (many - few) / (long - short)


def _returned(rows: list[list[int]], eos: int | None) -> int:
    return sum(row.index(eos) if eos in row else len(row) for row in rows)


def roofline_ms(row: Row, backbone: Any, batch: int, context: int, machine: Machine) -> float:
    """The least time of a step: the slower of reading its bytes and doing its arithmetic."""
    student = isinstance(row.model, PushForwardLM)
    step = predicted_step(row.model, row.k) if student else predicted_ar_step(backbone)
    entries = 1 if not student else row.k if row.model.config.design.conditional else 2 * row.k
    attention = attention_step(backbone, entries, context)
    seconds = max(
        (step.bytes + batch * attention.bytes) / machine.bytes_per_s,
        batch * (step.flops + attention.flops) / machine.flops_per_s,
    )
    return seconds * 1e3


def crossover(row: Row, ar: Row, backbone: Any, context: int, machine: Machine) -> int | None:
    """The smallest batch at which the roofline gives a row no more tokens a second than AR; None below 4,096."""
    for batch in range(1, 4097):
        mine = row.k / roofline_ms(row, backbone, batch, context, machine)
        if mine <= 1 / roofline_ms(ar, backbone, batch, context, machine):
            return batch
    return None


def table(
    backbone: Any, rows: list[Row], work: Work, machine: Machine, device: torch.device, progress: Any
) -> dict[str, Point]:
    """All rows at one batch and context."""
    batch, context = len(work.prompts), len(work.prompts[0])
    ways: dict[str, Iterator[tuple[float, float]]] = {STOCK: stock_rounds(backbone, work, device)}
    if batch == 1:
        most = max(row.k for row in rows)
        ways[f"{STOCK}, prompt lookup"] = lookup_rounds(backbone, work, device, most)
    ways |= {row.name: engine_rounds(row, work, device) for row in rows}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_ in range(-1, work.rounds):  # the first warms up
        for name, way in ways.items():
            progress.set_postfix_str(f"batch {batch}, context {context}, round {round_ + 1}: {name}")
            figures = next(way)
            if round_ >= 0:
                seen[name].append(figures)
            progress.update()
    floors = {row.name: roofline_ms(row, backbone, batch, context, machine) for row in rows}
    return {
        name: Point([f[0] for f in figures], [f[1] for f in figures], floors.get(name))
        for name, figures in seen.items()
    }


def company_cost(backbone: Any, context: int, device: torch.device, slots: int = 16) -> dict[str, float]:
    """Step latency of one request in an engine of many slots, as usual and batch-invariant."""
    result = {}
    for name, invariant in (("usual", False), ("batch-invariant", True)):
        config = EngineConfig(max_num_seqs=slots, max_model_len=context + 16, batch_invariant=invariant, check_every=1)
        engine = Engine(backbone, config)
        engine.submit(Request([1] * context))
        while engine.stats.steps < 3:
            engine.step()
        result[name] = statistics.median(_timed(engine.step, device) * 1e3 for _ in range(10))
    return result


def describe(points: dict[str, Point], batch: int, context: int) -> str:
    """A Markdown table."""
    lines = [
        f"| batch {batch}, context {context} | ms a step | tokens/s | × transformers | × engine AR | roofline, ms | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    stock, ar = (statistics.median(points[name].tokens_per_s) for name in (STOCK, "engine, AR"))
    for name, p in points.items():
        rate, ms = statistics.median(p.tokens_per_s), statistics.median(p.step_ms)
        floor = f"{p.roofline_ms:.1f} | {p.roofline_ms / ms:.0%}" if p.roofline_ms else "– | –"
        lines.append(
            f"| {name} | {ms:.1f} [{min(p.step_ms):.1f}, {max(p.step_ms):.1f}] | {rate:,.0f} [{min(p.tokens_per_s):,.0f}, "
            f"{max(p.tokens_per_s):,.0f}] | {rate / stock:.2f} | {rate / ar:.2f} | {floor} |"
        )
    return "\n".join(lines)


def draw_frontier(path: Path, results: dict[str, dict[str, Point]], batches: dict[str, int]) -> None:
    """Tokens a second of one request against those of the whole batch, a line a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    names = list(dict.fromkeys(name for points in results.values() for name in points))
    colours = plt.get_cmap("tab20")
    for i, name in enumerate(names):
        at = [
            (batches[key], statistics.median(points[name].tokens_per_s))
            for key, points in results.items()
            if name in points
        ]
        style = ":" if name.startswith(STOCK) else "--" if name.startswith("stock") else "-"
        axes.plot([r / b for b, r in at], [r for _, r in at], style, marker="o", label=name, color=colours(i % 20))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens/s of one request")
    axes.set_ylabel("tokens/s of the whole batch")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_arguments() -> tuple[argparse.Namespace, list[int], list[int], list[int]]:
    """The command line, and its batches, contexts and ks as numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", metavar="DIR", help="a trained student; none for random weights")
    parser.add_argument("--batch", default="1,4,16,64", help="batch sizes (default %(default)s)")
    parser.add_argument("--context", default="128", help="prompt lengths (default %(default)s)")
    parser.add_argument("--k", default="1,2,4", help="tokens a step (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=16, help="new tokens of a request each round (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one that warms up (default %(default)s)")
    parser.add_argument("--rows", metavar="TEXT", help="only engine rows whose name contains this; AR always runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--eos", type=int, help="end-of-text id: what follows it is not counted")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--tracking", help="MLflow URI (default: MLFLOW_TRACKING_URI, else sqlite below runs/), or off")
    given = parser.parse_args()
    batches, contexts, ks = ([int(n) for n in text.split(",")] for text in (given.batch, given.context, given.k))
    if min(*batches, *contexts, *ks, given.tokens, given.rounds) < 1 or given.tokens % max(ks):
        parser.error(f"sizes must be positive, and --tokens={given.tokens} a multiple of the largest k ({max(ks)})")
    return given, batches, contexts, ks


def main() -> None:
    """Read the command line, run, print."""
    given, batches, contexts, ks = read_arguments()
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    if given.student:
        backbone, rows = student_rows(given.student, ks, device, dtype)
    else:
        backbone, rows = random_rows(ks, device, dtype)
    rows = [row for row in rows if not given.rows or given.rows in row.name or row.name == "engine, AR"]
    machine = measure_machine(device, dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.config.vocab_size
    results, sizes = {}, {}
    total = sum((len(rows) + 1 + (b == 1)) * (given.rounds + 1) for b in batches) * len(contexts)
    with tqdm(total=total, file=sys.stderr, mininterval=5) as progress:
        for context in contexts:
            for batch in batches:
                prompts = torch.randint(0, vocabulary, (batch, context), generator=generator).tolist()
                work = Work(prompts, given.tokens, given.rounds, given.eos)
                key = f"batch {batch}, context {context}"
                results[key], sizes[key] = table(backbone, rows, work, machine, device, progress), batch
                gc.collect()
                print("\n" + describe(results[key], batch, context), flush=True)
    ar = rows[0]
    crossovers = {row.name: crossover(row, ar, backbone, contexts[0], machine) for row in rows[1:] if row.k > 1}
    record = {
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "gb_per_s": machine.bytes_per_s / 1e9,
            "gflop_per_s": machine.flops_per_s / 1e9,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": given.student or "random 12 × 768, vocabulary 32,000",
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "dtype": given.dtype,
        "results": {key: {name: vars(p) for name, p in points.items()} for key, points in results.items()},
        "crossover_batch": crossovers,
        "one_request_in_16_slots_ms": company_cost(backbone, contexts[0], device),
    }
    text = "\n\n".join(describe(points, sizes[key], int(key.split()[-1])) for key, points in results.items())
    text += "\n\n" + physics(record)
    print("\n" + physics(record))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "benchmark.md").write_text(text + "\n")
    (given.output / "benchmark.json").write_text(json.dumps(record, indent=1))
    draw_frontier(given.output / "benchmark.png", results, sizes)
    track(given.tracking, given.output, record)
    print(json.dumps(record))


def physics(record: dict[str, Any]) -> str:
    """What the machine can do, where k tokens a step stop paying, and what invariance costs, for people."""
    m, v, alone = record["machine"], record["versions"], record["one_request_in_16_slots_ms"]
    crossovers = ", ".join(f"{name} {batch or 'none'}" for name, batch in record["crossover_batch"].items())
    return "\n".join(
        [
            f"{m['gpu'] or m['cpu']}, {m['cores']} cores: reads {m['gb_per_s']:.1f} GB/s, computes {m['gflop_per_s']:,.0f} "
            f"GFLOP/s ({record['dtype']}); torch {v['torch']}, transformers {v['transformers']}; {record['model']}, "
            f"{record['parameters'] / 1e6:.0f} M parameters.",
            f"Batch from which the roofline gives a row no more tokens/s than AR: {crossovers}.",
            f"One request in 16 slots: {alone['usual']:.1f} ms a step, batch-invariant {alone['batch-invariant']:.1f} ms.",
        ]
    )


def _slug(name: str) -> str:
    """A name as MLflow takes it."""
    return name.replace(", ", "_").replace(" ", "_").replace("=", "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def track(uri: str | None, folder: Path, record: dict[str, Any]) -> None:
    """Log figures and files to MLflow; where it is not installed or reached, say so and go on."""
    if uri == "off":
        return
    try:
        from pipelines.tracking.mlflow_client import log_report

        params = {"model": record["model"], "dtype": record["dtype"], **record["machine"], **record["versions"]}
        metrics = {
            f"{_slug(name)}/{_slug(key)}/{figure}": statistics.median(point[figure])
            for key, points in record["results"].items()
            for name, point in points.items()
            for figure in ("tokens_per_s", "step_ms")
        }
        log_report(uri, "kforcing-benchmark", folder, params, metrics)
    except Exception as error:  # the figures are on disk and printed: nothing is lost
        print(f"warning: not logged to MLflow: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
