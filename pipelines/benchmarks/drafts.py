"""Exact mode on prompts: tokens a step and time, of drafts from the context, and of a student's where there is one.

    python -m pipelines.benchmarks.drafts [MODEL] [--prompts FILE.jsonl …] [--k K] [--new N] [--temperatures T …]

MODEL is a directory of an AR model or of a student, or `smollm2` (SmolLM2-135M-Instruct). Each prompt is answered twice, one
after the other and alone: by AR decoding, and in exact mode with k tokens a step. Both give the same tokens, which is
checked. Without --prompts there are two groups of prompts: edits and code that the answer repeats, and questions. A row gives

  tokens a step   at the width that the engine chooses, and at k in every step
  drafted         the share of steps that verified a draft, at k in every step (a student always has one)
  accepted        drafts accepted in such a step, of k − 1
  speed           seconds of AR decoding over seconds in exact mode at the chosen width: median over the prompts [quartiles]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kforcing.complete import read_prompts
from kforcing.engine import Engine, EngineConfig, EngineStats, Request, SamplingParams
from kforcing.metrics.external import load_external
from kforcing.readout.base import as_student

LETTER = (
    "Dear Ms Garcia, thank you for your letter of the 3rd of March. The two pumps that we ordered in Januray have not "
    "arived, and our workshop in Leeds stands still since Monday. Please send us the date of the delivery and the name of "
    "the carrier."
)
RECIPE = (
    "Peel four potatos and cut them into thin slices. Heat the oil in a pan, add the potatos and one onion, and cook them "
    "slowly for twenty minutes. Beat five eggs in a bowl, add the potatos, and put everything back into the pan for another "
    "five minutes."
)
MEAN = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)
"""
QUEUE = """class Queue:
    def __init__(self):
        self.items = []

    def put(self, item):
        self.items.append(item)

    def get(self):
        return self.items.pop(0)
"""
GROUPS = {
    "the answer repeats the prompt": [
        f"Correct the spelling of this letter and write all of it again:\n\n{LETTER}",
        f"Correct the spelling of this recipe and write all of it again:\n\n{RECIPE}",
        f"Rename the function to `average` and write all of the code again:\n\n```python\n{MEAN}```",
        f"Add a method `size` to the class and write all of the code again:\n\n```python\n{QUEUE}```",
        f"Summarise this letter in its own words:\n\n{LETTER}",
        f"List the steps of this recipe, one a line:\n\n{RECIPE}",
    ],
    "the answer is new": [
        "Why is the sky blue?",
        "Write a short story about a fox who wants to learn to swim.",
        "What should somebody know before moving to another country?",
        "Explain how a bicycle stays upright.",
        "Describe a day in the life of a baker.",
        "Give me three ideas for a birthday present for my sister.",
    ],
}


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--prompts", nargs="+", type=Path, default=[], help="files of JSON lines with a `prompt`")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each file (default %(default)s)")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer at most (default %(default)s)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7])
    given = parser.parse_args()
    try:
        rows = measure(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"model": given.model, "k": given.k, "rows": rows}))


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each group of prompts and temperature."""
    loaded = load_external(given.model)
    groups = GROUPS if not given.prompts else {path.stem: _from_file(path, given.limit) for path in given.prompts}
    ids = {name: [_ids(loaded.tokenizer, text) for text in texts] for name, texts in groups.items()}
    longest = max(len(prompt) for prompts in ids.values() for prompt in prompts) + given.new
    student = as_student(loaded.model)
    ar: Any = student.backbone if student else loaded.model
    coupling = student.design.coupling if student else EngineConfig.coupling
    engines = {
        "AR": Engine(ar, EngineConfig(1, longest, coupling=coupling)),
        "chosen": Engine(loaded.model, EngineConfig(1, longest, given.k, "exact")),
        "k": Engine(loaded.model, EngineConfig(1, longest, given.k, "exact", adapt_width=False)),
    }
    print(
        "| prompts | T | tokens a step: chosen width | k | drafted | accepted | speed |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, prompts in ids.items():
        for temperature in given.temperatures:
            sampling = SamplingParams(temperature)
            stop = frozenset([loaded.tokenizer.eos_token_id])
            requests = [Request(prompt, given.new, 0, stop, sampling=sampling) for prompt in prompts]
            rows.append({"prompts": name, "temperature": temperature, **_row(engines, requests)})
            print("| {prompts} | {temperature} | {chosen:.2f} | {k:.2f} | {drafted:.0%} | {accepted:.2f} | "
                  "{speed[1]:.2f}× [{speed[0]:.2f}, {speed[2]:.2f}] |".format(**rows[-1]), flush=True)  # fmt: skip
    return rows


def _row(engines: dict[str, Engine], requests: list[Request]) -> dict[str, Any]:
    """The figures of some requests, each run alone by each of the engines in turn."""
    speeds = []
    for engine in engines.values():
        engine.stats = EngineStats()
    for request in requests:
        seconds, answers = {}, {}
        for way, engine in engines.items():
            began = time.perf_counter()
            answers[way] = engine.generate([request])[0].tokens
            seconds[way] = time.perf_counter() - began
        if not answers["AR"] == answers["chosen"] == answers["k"]:
            raise ValueError("exact mode gave other tokens than AR decoding; use fp32 weights")
        speeds.append(seconds["AR"] / seconds["chosen"])
    stats = engines["k"].stats
    blocks, accepted = (stats.drafted or [0])[0], sum(stats.accepted)
    return {
        "chosen": engines["chosen"].stats.tokens_a_step,
        "k": stats.tokens_a_step,
        "drafted": blocks / max(stats.slot_steps, 1),
        "accepted": accepted / max(blocks, 1),
        "speed": statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3,
    }


def _from_file(path: Path, limit: int) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [record["prompt"] for record in read_prompts(lines, as_json=True)][:limit]


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt as a conversation's first turn, where the model has a chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt).input_ids)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


if __name__ == "__main__":
    main()
