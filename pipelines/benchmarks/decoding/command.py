"""Milliseconds a step, tokens a step and tokens a second of the decode engine, in fixed and exact mode, against others.

    python pipelines/benchmark.py                                a 12 × 768 model with random weights
    python pipelines/benchmark.py --student runs/quickstart/k4 --text FILE    a trained student, on prompts from a text
    python -m pipelines.benchmark --device cuda --dtype bf16 --batch 4,16,128 --tokens 32 --rounds 3

Ways of decoding: AR in the engine; a student in fixed mode; in exact mode with blocks of a fixed width; in exact mode with
widths that the engine chooses (k=auto); `generate` of transformers and, for one prompt, its assisted generation; llama.cpp
where it is installed and --gguf names the weights. All decode the same prompts with the same weights, and the engine's ways
under one coupling. Ways take turns within a round, so that a machine that slows down slows all of them; results are
written after every round. With random weights acceptance is simulated (see `simulation.py`), and a step takes as long as
with a trained student. Ratios are made round by round. *roofline* is the larger of (bytes a step ÷ this machine's memory
bandwidth) and (FLOPs a step ÷ its arithmetic), both measured in this run.

Figures are medians over rounds [smallest, largest]. benchmark.json, .md and .png are written below --output, and logged to
MLflow where it is installed. The last line is one JSON object. torch, transformers, numpy, tqdm and matplotlib suffice; where
the project itself is not installed, use `python -m pipelines.benchmark` in its root.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from kforcing.coupling import COUPLINGS
from kforcing.loading import DTYPES, load_tokenizer
from pipelines.benchmarks.decoding.hardware import Hardware, describe_hardware, measure_hardware, roofline_ms
from pipelines.benchmarks.decoding.report import (
    TRANSFORMERS,
    Record,
    describe,
    draw_frontier,
    physics,
    rows_record,
    title,
    track,
    write_results,
)
from pipelines.benchmarks.decoding.rounds import (
    DecodingRound,
    EngineRounds,
    Workload,
    llama_cpp_rounds,
    transformers_rounds,
)
from pipelines.benchmarks.decoding.ways import AR, DecodingWay, trained_ways, untrained_backbone, untrained_ways


def numbers(kind: type) -> Any:
    """A type for argparse: numbers that commas separate."""
    return lambda text: [kind(n) for n in text.split(",")]


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line. It exits with a message for sizes that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", metavar="DIR", help="a trained student; none for random weights")
    add("--text", metavar="FILE", help="where prompts come from (default: random ids)")
    add("--gguf", metavar="FILE", help="the AR model's weights for llama.cpp, which is left out without them")
    add("--assistant", metavar="DIR", help="a draft model for the assisted generation of transformers")
    add("--batch", type=numbers(int), default="1,4,16,64", help="batch sizes (default %(default)s)")
    add("--context", type=numbers(int), default="128", help="prompt lengths (default %(default)s)")
    add("--temperature", type=numbers(float), default="1,0,0.7", help="temperatures (default %(default)s)")
    add("--k", type=numbers(int), default="2,4", help="tokens of a block (default %(default)s)")
    add("--acceptance", type=numbers(float), default="0.8", help="of a draft, for random weights (default %(default)s)")
    add("--coupling", choices=list(COUPLINGS), default="gumbel", help="for random weights (default %(default)s)")
    add("--tokens", type=int, help="new tokens of a prompt each round (default: 256 ÷ batch, from 8 to 64)")
    add("--rounds", type=int, default=5, help="rounds after one that warms up (default %(default)s)")
    add("--rows", metavar="TEXT", help="only ways of the engine whose name contains this; AR always runs")
    add("--more", action="store_true", help="also the paper's read-out, stock kernels and more (random weights)")
    add("--int8", action="store_true", help="also AR and k=auto with weights of 8 bits (CPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), default="fp32")
    add("--output", type=Path, default=Path("runs/benchmark"))
    add("--tracking", help="MLflow URI (default: MLFLOW_TRACKING_URI, else sqlite below runs/), or off")
    given = parser.parse_args(words)
    if min(*given.batch, *given.context, *given.k, given.rounds, 1 if given.tokens is None else given.tokens) < 1:
        parser.error("batch, context, k, tokens and rounds must be positive")
    if given.text and not given.student:
        parser.error("--text needs --student, whose tokenizer reads it")
    return given


def prompts_of(given: argparse.Namespace, vocabulary: int, batch: int, context: int) -> list[list[int]]:
    """Random ids, or stretches of a text at even distances. Raises ValueError when the text is too short."""
    if not given.text:
        return torch.randint(vocabulary, (batch, context), generator=torch.Generator().manual_seed(0)).tolist()
    ids = load_tokenizer(given.student)(Path(given.text).read_text(), add_special_tokens=False)["input_ids"]
    if len(ids) < context:
        raise ValueError(f"--text {given.text} has {len(ids)} tokens; prompts of --context {context} need more text")
    starts = torch.linspace(0, len(ids) - context, batch).long().tolist()
    return [ids[start : start + context] for start in starts]


def sources(
    given: argparse.Namespace, backbone: Any, ways: list[DecodingWay], work: Workload, device: torch.device
) -> dict[str, Iterator[DecodingRound]]:
    """The rounds of every way of decoding."""
    found: dict[str, Iterator[DecodingRound]] = {TRANSFORMERS: transformers_rounds(backbone, work, device)}
    if len(work.prompts) == 1:
        lookup = {"prompt_lookup_num_tokens": max(given.k)}
        found[f"{TRANSFORMERS}, prompt lookup"] = transformers_rounds(backbone, work, device, **lookup)
        if given.assistant:
            draft: Any = AutoModelForCausalLM.from_pretrained(given.assistant, trust_remote_code=False).eval()
            draft.to(device, backbone.dtype)
            found[f"{TRANSFORMERS}, assisted"] = transformers_rounds(backbone, work, device, assistant_model=draft)
        if given.gguf and find_spec("llama_cpp"):
            found["llama.cpp"] = llama_cpp_rounds(given.gguf, work, torch.get_num_threads())
    return found | {way.name: iter(EngineRounds(way, work, device)) for way in ways}


def measure(
    given: argparse.Namespace, backbone: Any, ways: list[DecodingWay], table: Record, hardware: Hardware
) -> Iterator[Record]:
    """The rows of a table, again after every round, with one more figure each."""
    batch, context = table["batch"], table["context"]
    prompts = prompts_of(given, backbone.config.vocab_size, batch, context)
    tokens = given.tokens or min(max(256 // batch, 8), 64)
    work = Workload(prompts, tokens, given.rounds, table["temperature"])
    device = torch.device(given.device)
    ways = [way for way in ways if way.knows(work.temperature)]
    fixed = [way for way in ways if not way.adapt_width and not way.quantization]
    rooflines = {way.name: roofline_ms(way, backbone, batch, context, hardware) for way in fixed}
    running = sources(given, backbone, ways, work, device)
    seen: dict[str, list[DecodingRound]] = {name: [] for name in running}
    for number in range(given.rounds + 1):  # the first warms up
        for name, rounds in list(running.items()):
            start = time.perf_counter()
            try:
                done = next(rounds)
            except RuntimeError as error:  # of one kernel or graph; the other rows are worth having
                print(f"warning: {title(table)}: {name} is left out: {error}", file=sys.stderr, flush=True)
                del running[name], seen[name]
                continue
            seen[name] += [done] if number else []
            print(
                f"{title(table)}, round {number} of {given.rounds}: {name}: {done.step_ms:.2f} ms a step, "
                f"{done.tokens_a_step:.2f} tokens a step ({time.perf_counter() - start:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
        if number:
            yield rows_record(seen, rooflines)


def models(given: argparse.Namespace) -> tuple[Any, dict[float | None, list[DecodingWay]], str]:
    """The AR model, the ways of decoding for each simulated acceptance, and their coupling."""
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    by_acceptance: dict[float | None, list[DecodingWay]]
    if given.student:
        backbone, ways = trained_ways(given.student, given.k, device, dtype)
        by_acceptance = {None: ways}
    else:
        backbone = untrained_backbone(device, dtype)
        by_acceptance = {
            acceptance: untrained_ways(backbone, given.k, given.coupling, acceptance, given.more)
            for acceptance in given.acceptance
        }
    for acceptance, ways in by_acceptance.items():
        kept = [way for way in ways if not given.rows or given.rows in way.name or way.name == AR]
        quantised = [way for way in kept if given.int8 and (way.name == AR or way.adapt_width)]
        by_acceptance[acceptance] = kept + [
            dataclasses.replace(way, name=f"{way.name}, int8", quantization="int8") for way in quantised
        ]
    return backbone, by_acceptance, next(iter(by_acceptance.values()))[0].coupling


def main() -> None:
    """Read the command line, run, print."""
    given = read_arguments()
    try:
        print(json.dumps(run(given)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(given: argparse.Namespace) -> Record:
    """All tables, written after every round."""
    backbone, by_acceptance, coupling = models(given)
    device = torch.device(given.device)
    hardware = measure_hardware(device, DTYPES[given.dtype])
    record: Record = {
        "machine": describe_hardware(device, hardware),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": given.student or "random 12 × 768, vocabulary 32,000",
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "dtype": given.dtype,
        "coupling": coupling,
        "tables": [],
    }
    grid = itertools.product(by_acceptance.items(), given.temperature, given.context, given.batch)
    for (acceptance, ways), temperature, context, batch in grid:
        table: Record = {"batch": batch, "context": context, "temperature": temperature, "acceptance": acceptance}
        record["tables"].append(table)
        for rows in measure(given, backbone, ways, table, hardware):
            table["rows"] = rows
            write_results(given.output, record)
        gc.collect()  # each engine holds a cache
        print("\n" + describe(table), flush=True)
    draw_frontier(given.output / "benchmark.png", record)
    print("\n" + physics(record))
    track(given.tracking, given.output, record)
    return record


if __name__ == "__main__":
    main()
