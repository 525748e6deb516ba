"""Log-probabilities in OpenAI's two shapes, that of completions and that of chat completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from kforcing.detokenizer import Detokenizer, TextStream
from kforcing.engine import TokenLogprobs

LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON cannot hold."""

Scored = tuple[int, TokenLogprobs | None]
"""A token and its log-probabilities; the first token of a prompt has none."""


class CompletionLogprobs(BaseModel):
    """The log-probabilities of a completion: one entry for each token in every list."""

    tokens: list[str]
    """The text of each token alone; `bytes:\\x..` for a part of a character."""
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """Of the likeliest tokens at each place, and of the token itself."""
    text_offset: list[int]
    """Where the text of each token begins in the text of the choice."""


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a message with its log-probability and those of the likeliest tokens at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class LogprobsWriter:
    """Writes the `logprobs` of one choice, piece by piece.

    Args:
        detokenizer: of the model.
        chat: in the shape of chat completions.
        prompt: the ids before the first token that is written.
    """

    def __init__(self, detokenizer: Detokenizer, chat: bool, prompt: Sequence[int]):
        self.detokenizer, self.chat = detokenizer, chat
        self.text = TextStream(detokenizer, prompt=prompt)
        self.offset = 0

    def write(self, tokens: Iterable[Scored]) -> dict[str, Any]:
        """The record of some tokens, see `CompletionLogprobs` and `ChatLogprobs`."""
        if self.chat:
            return {"content": [self._of_chat(id, scores) for id, scores in tokens if scores], "refusal": None}
        rows = [self._of_completion(id, scores) for id, scores in tokens]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[i] for row in rows] for i, name in enumerate(names)}

    def _of_completion(self, id: int, scores: TokenLogprobs | None) -> tuple[Any, ...]:
        token, offset = self.detokenizer.token(id)[0], self.offset
        self.offset += len(self.text.push([id]).text)
        if scores is None:
            return token, None, None, offset
        own = max(scores.logprob, LOWEST)
        top: dict[str, float] = {}
        for other, logprob in [*scores.top.items(), (id, scores.logprob)]:
            top.setdefault(
                self.detokenizer.token(other)[0], max(logprob, LOWEST)
            )  # the likeliest of those with this text
        return token, own, top, offset

    def _of_chat(self, id: int, scores: TokenLogprobs) -> dict[str, Any]:
        top = [self._one(other, logprob) for other, logprob in scores.top.items()]
        return {**self._one(id, scores.logprob), "top_logprobs": top}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        token, data = self.detokenizer.token(id)
        return {"token": token, "logprob": max(logprob, LOWEST), "bytes": list(data)}
