"""Rounds of decoding: generators that decode the same prompts on and on, and give one `DecodingRound` after the other.

Prompts are read before the clock runs. Every round makes about the same number of tokens for each prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from kforcing.engine import Engine, EngineConfig, Request, SamplingParams
from kforcing.engine.config import context_limit
from pipelines.benchmarks.decoding.hardware import timed
from pipelines.benchmarks.decoding.ways import DecodingWay

LEARNING_BLOCKS = 400
"""Blocks that an engine which chooses its widths decodes before the first round."""

FIRST_PASS = 21
"""Tokens that the first pass of assisted generation may bring."""


@dataclass(frozen=True)
class Workload:
    """What every way of decoding has to do."""

    prompts: list[list[int]]
    """Of equal length."""
    tokens: int
    """New tokens of each prompt in a round."""
    rounds: int
    """Rounds after one that warms up."""
    temperature: float = 1.0


@dataclass(frozen=True)
class DecodingRound:
    """What a round took and brought."""

    seconds: float
    steps: int
    """Forward passes."""
    tokens: int
    """Of all prompts together."""
    batch: int

    @property
    def step_ms(self) -> float:
        """Milliseconds a step."""
        return self.seconds / self.steps * 1e3

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a step brings each prompt."""
        return self.tokens / self.steps / self.batch

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all prompts together."""
        return self.tokens / self.seconds


class EngineRounds:
    """An engine for one workload. Iterating gives its rounds.

    Raises ValueError when the model has too few positions for all rounds.
    """

    def __init__(self, way: DecodingWay, work: Workload, device: torch.device):
        self.work, self.device = work, device
        self.batch, self.adapts = len(work.prompts), way.adapt_width
        context, every = len(work.prompts[0]), 8 if device.type == "cuda" else 1
        # Some prompts are ahead of the mean.
        length = context + 4 * every * way.k + 2 * (work.rounds + 1) * (work.tokens + every * way.k)
        limit = context_limit(way.model.config if not way.student else way.student.backbone.config)
        self.engine = Engine(
            way.model,
            EngineConfig(
                max_num_seqs=self.batch,
                max_model_len=length if limit is None else min(length, limit - way.k + 1),
                k=way.k,
                acceptance="exact" if way.exact else "fixed",
                adapt_width=way.adapt_width,
                row_kernel=way.row_kernel,
                quantization=way.quantization,
                batch_invariant=way.batch_invariant,
                coupling=way.coupling,
                check_every=every,
                max_num_batched_tokens=256 if way.batch_invariant else 1024,
            ),
        )

    def __iter__(self) -> Iterator[DecodingRound]:
        if self.adapts or self.device.type == "cuda":
            self._learn()
        self._start()
        stats = self.engine.stats
        while True:
            tokens, steps = stats.tokens, stats.steps
            seconds = timed(lambda: self._advance(self.work.tokens), self.device)
            yield DecodingRound(seconds, stats.steps - steps, stats.tokens - tokens, self.batch)

    def _start(self) -> None:
        """Read the prompts, and decode until every prompt is past its first two steps."""
        sampling = SamplingParams(temperature=self.work.temperature)
        for i, prompt in enumerate(self.work.prompts):
            self.engine.submit(Request(prompt, seed=i, sampling=sampling))
        while len(self.engine.scheduler.running) < self.batch:
            self.engine.step()
        for _ in range(2 // self.engine.check_every):
            self.engine.step()

    def _advance(self, tokens: int) -> None:
        """Decode so many new tokens of each prompt on average."""
        until = self.engine.stats.tokens + tokens * self.batch
        while self.engine.stats.tokens < until:
            self.engine.step()
            if len(self.engine.scheduler.running) < self.batch:
                raise ValueError(
                    f"a prompt of {len(self.work.prompts[0])} tokens has reached the {self.engine.max_model_len} positions "
                    "of the model; ask for fewer rounds, shorter rounds or shorter prompts"
                )

    def _learn(self) -> None:
        """Decode what the rounds will decode until widths were tried and CUDA graphs captured; then cancel it."""
        engine, steps = self.engine, 10 * self.engine.k * self.engine.check_every
        while True:
            first = engine.stats.slot_steps
            self._start()
            ids = [sequence.id for sequence in engine.scheduler.running]
            for _ in range(self.work.rounds + 1):  # in the steps of the rounds, so that lengths do not go beyond these
                self._advance(self.work.tokens)
            for id in ids:
                engine.cancel(id)
            engine.step()
            assert engine.idle
            assert engine.stats.slot_steps > first
            if not self.adapts or engine.stats.slot_steps >= max(LEARNING_BLOCKS, steps * self.batch):
                return


class TokenClock(BaseStreamer):
    """A streamer of transformers that notes when tokens come and how many: the prompt first, then those of each pass."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Note tokens that the host has already received."""
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing is left to note."""


@torch.inference_mode()
def transformers_rounds(
    backbone: Any, work: Workload, device: torch.device, **assistant: Any
) -> Iterator[DecodingRound]:
    """`generate` of transformers. A round is what follows the first pass of the AR model, which reads the prompts again.

    Args:
        assistant: `prompt_lookup_num_tokens` or `assistant_model`, for assisted generation of one prompt.
    """
    ids, temperature = torch.tensor(work.prompts, device=device), work.temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    new = work.tokens + (FIRST_PASS if assistant else 1)
    ends = {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    while True:
        clock = TokenClock()
        backbone.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **sampling, **ends, **assistant)
        assert sum(clock.counts[1:]) == new * len(ids)
        yield DecodingRound(clock.times[-1] - clock.times[1], len(clock.times) - 2, sum(clock.counts[2:]), len(ids))


def llama_cpp_rounds(gguf: str, work: Workload, threads: int) -> Iterator[DecodingRound]:
    """llama.cpp for the first prompt, with the weights of a GGUF file."""
    context = len(work.prompts[0]) + (work.rounds + 1) * (work.tokens + 1) + 8
    # By name, because it is no dependency: the row exists where it is installed.
    model = import_module("llama_cpp").Llama(
        gguf, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    model.eval(work.prompts[0])

    def advance(tokens: int) -> None:
        for _ in range(tokens):
            model.eval([model.sample(temp=work.temperature, top_k=0, top_p=1.0, min_p=0.0)])

    while True:
        seconds = timed(lambda: advance(work.tokens), torch.device("cpu"))
        yield DecodingRound(seconds, work.tokens, work.tokens, 1)
