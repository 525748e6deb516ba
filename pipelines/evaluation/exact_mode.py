"""What a student is worth in exact mode: is its text the AR model's, how many tokens come from a step, how much faster is it?

Held-out prompts are continued by the AR model and by the student in exact mode, in the same engine and under the same noise.
Drafts from the context count too.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kforcing.device import pick_device
from kforcing.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from kforcing.modeling import PushForwardLM
from kforcing.remote import fetch
from pipelines.config.schema import EvalConfig
from pipelines.data.rows import tokens_of
from pipelines.data.token_store import TokenStore

TEMPERATURES = (1.0, 0.7, 0.0)
BATCHES = (1, 4)
"""Prompts at a time of which speed is measured, at temperature 1."""
PROMPTS = 8
"""Prompts of which texts and tokens a step are compared."""
WARM_UP, ROUNDS = 2, 4
"""Rounds before the clock counts, and after. AR model and student take turns in each, which has prompts of its own."""


@dataclass(frozen=True)
class ExactJob:
    """A student, and the held-out text that prompts come from."""

    student: str
    heldout: str
    seed: int
    config: EvalConfig


def measure_exact_mode(job: ExactJob) -> dict[str, Any]:
    """The figures of a student that can verify its tokens, for `report.json`.

    Returns:
        `texts` and how many of them are `equal` to the AR model's, `tokens_a_step` by temperature where every block has k
        tokens, and `speed` by the number of prompts at a time, where the engine chooses the width of each step: tokens a
        second over those of the AR model, median over rounds. Keys are strings, as in JSON.
    """
    student: Any = PushForwardLM.from_pretrained(fetch(job.student)).to(pick_device())
    threads = torch.get_num_threads()
    torch.set_num_threads(min(16, len(os.sched_getaffinity(0))))  # Ray gives a task of one CPU one thread
    try:
        return _measure(job, student)
    finally:
        torch.set_num_threads(threads)


def _measure(job: ExactJob, student: Any) -> dict[str, Any]:
    rows = TokenStore(job.heldout, job.seed).read(np.arange(PROMPTS))
    prompts = tokens_of(rows)[:, : job.config.prompt_tokens].tolist()
    longest, coupling = job.config.prompt_tokens + job.config.new_tokens, student.design.coupling
    ar = Engine(student.backbone, EngineConfig(max(BATCHES), longest, coupling=coupling))
    exact = Engine(student, EngineConfig(max(BATCHES), longest, acceptance="exact"))
    full = Engine(student, EngineConfig(max(BATCHES), longest, acceptance="exact", adapt_width=False))

    def run(engine: Engine, temperature: float, first: int = 0, n: int = len(prompts)) -> list[Completion]:
        sampling = SamplingParams(temperature=temperature)
        requests = [
            Request(prompts[i % len(prompts)], job.config.new_tokens, seed=job.seed + i, sampling=sampling)
            for i in range(first, first + n)
        ]
        return engine.generate(requests)

    equal, tokens_a_step = 0, {}
    for temperature in TEMPERATURES:
        texts, done = (run(engine, temperature) for engine in (ar, full))
        equal += sum(a.tokens == b.tokens for a, b in zip(texts, done, strict=True))
        tokens_a_step[f"{temperature:g}"] = statistics.fmean(c.tokens_a_step for c in done)
    speed = {}
    for n in BATCHES:
        ratios = []
        for number in range(WARM_UP + ROUNDS):
            seconds = []
            for engine in (ar, exact):
                start = time.perf_counter()
                run(engine, 1.0, number * n, n)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
        speed[str(n)] = statistics.median(ratios[WARM_UP:])
    return {"texts": len(TEMPERATURES) * len(prompts), "equal": equal, "tokens_a_step": tokens_a_step, "speed": speed}


def headline(name: str, figures: dict[str, Any]) -> str:
    """The figures in one sentence."""
    steps = ", ".join(f"{value:.2f} at T = {t}" for t, value in figures["tokens_a_step"].items())
    speeds = ", ".join(f"{value:.2f}× at batch {n}" for n, value in figures["speed"].items())
    return (
        f"{name}, exact mode: the AR model's own text ({figures['equal']} of {figures['texts']} texts are equal), tokens a "
        f"step of full width: {steps}; tokens a second over the AR model's in the same engine, at widths that the engine "
        f"chooses: {speeds}"
    )
