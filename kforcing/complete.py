"""Complete the prompts of a file.

    python -m kforcing.complete MODEL prompts.txt -o out.jsonl --max-new-tokens 64 --k 4

MODEL is a student's directory or that of a causal LM of transformers. Prompts are lines of text, or of JSON with a
`prompt` when the name ends in .jsonl; `-` is standard input. Each line of the output is a JSON object with `prompt`, `text`,
`tokens` (ids), `finish_reason` and `steps` (forward passes), in the order of the prompts. All prompts use the same seed
unless a JSON line has its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm

from kforcing import PushForwardLM
from kforcing.detokenizer import Detokenizer
from kforcing.engine import Engine, EngineConfig, Output, Request, SamplingParams
from kforcing.engine.config import context_limit
from kforcing.engine.request import ACCEPTANCES
from kforcing.loading import DTYPES, eos_token_ids, load_model, load_tokenizer, saved_generation_config
from kforcing.prompts import prompt_ids
from kforcing.remote import fetch


def read_prompts(lines: TextIO, as_json: bool) -> Iterator[dict[str, Any]]:
    """One record a line; empty lines are left out. Raises ValueError that names the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not as_json:
            yield {"prompt": line.rstrip("\r\n")}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
            raise ValueError(f'line {number} has no "prompt"; expected {{"prompt": "some text"}}')
        yield record


def complete(engine: Engine, requests: list[Request], progress: Any) -> Iterator[tuple[list[int], Output]]:
    """Tokens and last output of each request, in order, as soon as it and those before it have ended."""
    made: list[list[int]] = [[] for _ in requests]
    ends: dict[int, Output] = {}
    ids: dict[int, int] = {}
    given = done = 0
    while done < len(requests):
        while given < len(requests) and len(engine.scheduler.waiting) < engine.config.max_num_seqs:
            ids[engine.submit(requests[given])] = given
            given += 1
        for output in engine.step():
            i = ids[output.id]
            made[i] += output.tokens
            if output.finish_reason:
                ends[i] = output
                a_step = f"{engine.stats.tokens_a_step:.2f} tokens a step"
                progress.set_postfix_str(f"{engine.stats.tokens:,} tokens, {engine.stats.steps:,} steps, {a_step}")
                progress.update()
        while done in ends:
            yield made[done], ends[done]
            done += 1


def main() -> None:
    """Read the command line, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompts", metavar="FILE")
    parser.add_argument("-o", "--output", default="-", help="where to (default: standard output)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="for each prompt (default %(default)s)")
    parser.add_argument("--k", type=int, help="tokens a step (default: the student's k)")
    parser.add_argument(
        "--acceptance",
        choices=list(ACCEPTANCES),
        default="fixed",
        help="fixed: each step gives k tokens; exact: the text is the AR model's own (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=16, help="prompts at a time (default %(default)s)")
    parser.add_argument("--coupling", default="inverse_cdf", help="of an AR model (default %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=list(DTYPES))
    given = parser.parse_args()
    try:
        run(given)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def run(given: argparse.Namespace) -> None:
    """Everything but the command line. What cannot be served is refused before the first step."""
    with ExitStack() as stack:
        source = sys.stdin if given.prompts == "-" else stack.enter_context(open(given.prompts, encoding="utf-8"))
        records = list(read_prompts(source, given.prompts.endswith(".jsonl")))
        folder = fetch(given.model)
        tokenizer = load_tokenizer(folder)
        sampling = SamplingParams(temperature=given.temperature, top_p=given.top_p)
        prompts = [prompt_ids(tokenizer, record["prompt"]) for record in records]
        model = load_model(folder, given.device, given.dtype)
        backbone = model.backbone if isinstance(model, PushForwardLM) else model
        # As much context as these prompts need, within what the model has.
        needed = max(map(len, prompts), default=1) + given.max_new_tokens
        k = given.k or getattr(model, "k", 1)
        limit = context_limit(backbone.config)
        slots = max(1, min(given.slots, len(prompts)))
        max_model_len = needed if limit is None else min(needed, limit - k + 1)
        config = EngineConfig(
            max_num_seqs=slots,
            max_model_len=max(max_model_len, 2),
            k=given.k,
            acceptance=given.acceptance,
            coupling=given.coupling,
        )
        engine = Engine(model, config)
        stop = eos_token_ids(saved_generation_config(folder), tokenizer, engine.vocabulary)
        requests = [
            Request(ids, given.max_new_tokens, record.get("seed", given.seed), stop, None, sampling)
            for ids, record in zip(prompts, records, strict=True)
        ]
        for number, request in enumerate(requests, start=1):
            try:
                engine.check(request)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        out = sys.stdout if given.output == "-" else stack.enter_context(open(given.output, "w", encoding="utf-8"))
        progress = stack.enter_context(tqdm(total=len(requests), unit="prompt", file=sys.stderr))
        detokenizer = Detokenizer(tokenizer)
        answers = complete(engine, requests, progress)
        for record, prompt, (tokens, last) in zip(records, prompts, answers, strict=True):
            answer = {
                "prompt": record["prompt"],
                "text": detokenizer.continuation(prompt, tokens),
                "tokens": tokens,
                "finish_reason": last.finish_reason,
                "steps": last.steps,
            }
            out.write(json.dumps(answer, ensure_ascii=False) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
