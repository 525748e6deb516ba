"""What is asked of the engine and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kforcing.structured import Grammar

MAX_LOGPROBS = 20
"""The largest number of likeliest tokens whose log-probabilities are returned, as in vLLM."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from a request's distributions."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token. An argmax student knows only those it was trained for."""
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 for all. Needs explicit distributions: AR or a sequential student."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens that holds this probability (nucleus). Needs the same."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time the request has made it before. With an argmax student a heuristic:
    hints of the same block have not seen the change."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that the request has made before; the same holds."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the prompt or the answer has, and multiplies the negative ones; the same
    holds."""
    min_p: float = 0.0
    """Leave out tokens that are less likely than this share of the likeliest one. Needs the same as `top_k`."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    min_tokens: int = 0
    """Make no stop id before so many tokens."""
    logprobs: int | None = None
    """Return the log-probability of each token and of so many likeliest tokens at its place; 0 for the token's alone, None
    for nothing. They are those of the model itself: before temperature, filters and penalties. Exact mode and AR give the AR
    model's. Fixed mode gives a sequential student's, over its shortlist where it has one. Argmax students have none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt from the second on. They are those of the AR model in every mode."""

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("min_p", self.min_p, 0.0, 1.0),
            *((f"logit_bias[{token}]", bias, -100.0, 100.0) for token, bias in self.logit_bias.items()),
        ):
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name}={value} must be a number from {low:g} to {high:g}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} is too small to divide by; use 0 for the likeliest token")
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token to draw; use temperature=0 for the likeliest")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 for all tokens)")
        for name, n in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if n is not None and not 0 <= n <= MAX_LOGPROBS:
                raise ValueError(f"{name}={n}: ask for 0 to {MAX_LOGPROBS} likeliest tokens, or None")

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the distributions as they are, but for temperature."""
        return self.temperature > 0 and not self.filters and not self.changes_logits

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are changed before anything else."""
        penalises = self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1
        return penalises or bool(self.logit_bias) or self.min_tokens > 0


ACCEPTANCES = ("exact", "fixed")


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: list[int]
    """Token ids, at least one."""
    max_new_tokens: int | None = None
    """Tokens returned at most; none for as many as the engine's context holds."""
    seed: int = 0
    """Of the noise: the token at a position is made from z(seed, position)."""
    stop_ids: frozenset[int] = frozenset()
    """Ends the continuation before the first of these (EOS belongs here)."""
    k: int | None = None
    """Tokens a step, at most the engine's, which is the default."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    acceptance: str | None = None
    """`exact`: the tokens of a block are drafts, and those are kept that the AR model draws itself under the same noise; the
    text is the AR model's, and a step brings 1 to k tokens. `fixed`: every step brings exactly k tokens, none of them
    verified. None for the engine's mode."""
    grammar: Grammar | None = None
    """The form of the text (`kforcing.structured`). EOS, which ends it, must be among `stop_ids`. With an argmax student a
    heuristic: hints of the same block have not seen what is allowed."""

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the distributions as they are, but for temperature."""
        return self.sampling.plain and self.grammar is None

    @property
    def unfiltered(self) -> bool:
        """Whether nothing but a temperature, which may be 0, decides what is drawn from a distribution."""
        return self.grammar is None and not (self.sampling.filters or self.sampling.changes_logits)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at the place of one token."""

    logprob: float
    """Of the token itself."""
    top: dict[int, float]
    """Of the likeliest tokens, by id, the likeliest first."""


@dataclass
class DraftCounts:
    """Exact mode: what became of the drafts, for each offset 2, 3, … of a block. Empty lists where none was verified."""

    drafted: list[int] = field(default_factory=list)
    """How many drafts were verified."""
    accepted: list[int] = field(default_factory=list)
    """How many of them, and of all drafts before them in their block, equal the AR model's own token."""

    def count_block(self, drafted: int, accepted: int) -> None:
        """Count one verified block: `drafted` tokens beyond the first, of which the first `accepted` were kept."""
        missing = drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for offset in range(drafted):
            self.drafted[offset] += 1
            self.accepted[offset] += offset < accepted


@dataclass(frozen=True)
class Output:
    """What a step made for a request."""

    id: int
    tokens: list[int]
    finish_reason: str | None = None
    """`stop` (a stop id came), `length` (as many tokens as asked for) or none yet."""
    stop_id: int | None = None
    """The id that ended it; not among the tokens."""
    steps: int = field(default=0, compare=False)
    """Steps that the request has taken so far: its tokens divided by its steps are the accepted tokens a step."""
    logprobs: list[TokenLogprobs] | None = field(default=None, compare=False)
    """One entry for each token, if the request asked for them."""
    drafts: DraftCounts = field(default_factory=DraftCounts, compare=False)
    """What became of the request's drafts so far."""
    cached: int = field(default=0, compare=False)
    """Tokens of the prompt that were taken over from an earlier one (see `EngineConfig.prefix_cache_mb`)."""
    prompt_logprobs: list[TokenLogprobs] | None = field(default=None, compare=False)
    """In the first output, if the request asked for them: one entry for each token of the prompt from the second on."""


@dataclass(frozen=True)
class Completion:
    """A whole continuation."""

    tokens: list[int]
    finish_reason: str
    stop_id: int | None = None
    steps: int = field(default=0, compare=False)
    """Steps that the request took."""
    logprobs: list[TokenLogprobs] | None = field(default=None, compare=False)
    """One entry for each token, if the request asked for them."""
    drafts: DraftCounts = field(default_factory=DraftCounts, compare=False)
    """What became of the request's drafts."""
    cached: int = field(default=0, compare=False)
    """Tokens of the prompt that were taken over from an earlier one."""
    prompt_logprobs: list[TokenLogprobs] | None = field(default=None, compare=False)
    """One entry for each token of the prompt from the second on, if the request asked for them."""

    @property
    def tokens_a_step(self) -> float:
        """Tokens for each step of the request; 0 without steps."""
        return len(self.tokens) / self.steps if self.steps else 0.0
