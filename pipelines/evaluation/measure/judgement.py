"""Win rates of the rows' texts against the AR model's, by an LLM judge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kforcing.loading import load_tokenizer
from pipelines.evaluation.decoders import slug
from pipelines.evaluation.judge import JudgeConfig, Pair, judge
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import heldout


def judged_rows(folder: Path, measurement: Measurement, given: dict[str, Any]) -> dict[str, Any]:
    """Win rate and flip rate of each row's texts against the AR model's; the judge is asked in both orders."""
    config, section = measurement.config, measurement.config.judge
    asked = JudgeConfig(str(section.url), section.model, key_env=section.key_env, max_tokens=section.max_tokens)
    tokenizer = load_tokenizer(measurement.subject.tokenizer)

    def texts(made: list[list[int]]) -> list[str]:
        return [str(tokenizer.decode(row)) for row in measurement.cut(torch.tensor(made))]

    prompts, theirs = given["references"]["prompts"], texts(given["references"]["again"][0])
    docs = dict(zip(prompts, heldout(measurement, len(prompts), 1).doc_R.tolist(), strict=True))
    found: dict[str, Any] = {}
    for name in measurement.rows:
        mine = texts(given[f"row-{slug(name)}"]["tokens"])
        pairs = [Pair(*pair) for pair in zip(prompts, theirs, mine, strict=True)]
        verdicts = judge(pairs, asked, folder / f"{slug(name)}.jsonl")
        documents = [docs[prompt] for prompt in verdicts.prompts]
        intervals = verdicts.intervals(config.bootstrap, config.seed, documents)
        found[name] = {**{n: asdict(i) for n, i in intervals.items()}, "invalid": verdicts.invalid}
    return found
