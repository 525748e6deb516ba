"""Text that an AR model writes itself: what a student of it is trained on.

A chat model writes both sides of a conversation. Its chat template is cut where the user's words stand: the model continues
the opening until it ends the user's turn, then the template goes on, and the model answers. A model without a chat template
continues its own beginning-of-text token, or given prompts.

    <|im_start|>user⏎  ─► the model writes the user's turn ─►  <|im_end|>⏎<|im_start|>assistant⏎  ─► the model answers

Document n is a function of (model, seed, n) alone, up to rounding that depends on the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kforcing.engine import Engine, Request, SamplingParams
from kforcing.keys import derive_key

_MARK = "\x00user\x00"
_NGRAM = 8
"""Length of the phrases whose repetition is counted, in tokens."""


@dataclass(frozen=True)
class TextSettings:
    """How documents are written."""

    seed: int = 0
    user_tokens: int = 96
    """The longest user's turn; a longer one is dropped."""
    answer_tokens: int = 384
    """The longest answer or continuation; a longer one is cut here."""
    temperatures: tuple[float, ...] = (1.0, 0.7)
    """Temperatures of answers; each document takes one of them. A user's turn has temperature 1, for variety."""
    repetition: float = 0.5
    """A document is dropped when more than this share of its 8-token phrases occurred before in it."""


@dataclass(frozen=True)
class Document:
    """One document, or the reason why it was dropped."""

    number: int
    tokens: list[int] = field(default_factory=list)
    """With the template's tokens, without the last EOS. Empty when it was dropped."""
    temperature: float = 1.0
    dropped: str | None = None
    """`empty turn`, `endless turn`, `repetition` or None."""


@dataclass(frozen=True)
class ChatFrame:
    """The template of a conversation of one exchange, in tokens."""

    opening: list[int]
    """Up to the user's words."""
    middle: list[int]
    """From behind the user's words to the answer."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame | None:
        """The frame of a tokenizer's chat template, or None where it has none.

        Raises ValueError when the template changes the user's words.
        """
        if not tokenizer.chat_template:
            return None
        message = [{"role": "user", "content": _MARK}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if text.count(_MARK) != 1:
            raise ValueError("the chat template does not hold the user's words once, as they are; give prompts instead")
        opening, middle = (tokenizer.encode(part, add_special_tokens=False) for part in text.split(_MARK))
        return cls(opening, middle)


class TextWriter:
    """Writes documents with a decode engine.

    Args:
        engine: of the model that writes, with nothing else to do.
        tokenizer: the model's.
        stop_ids: tokens that end a turn.
        settings: see `TextSettings`.
    Raises:
        ValueError: when the model has neither a chat template nor a beginning-of-text or EOS token to start from.
    """

    def __init__(self, engine: Engine, tokenizer: Any, stop_ids: frozenset[int], settings: TextSettings):
        self.engine, self.stop_ids, self.settings = engine, stop_ids, settings
        self.frame = ChatFrame.of(tokenizer)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.frame is None and start is None:
            raise ValueError("the tokenizer has neither a chat template nor a BOS or EOS token to start a text from")
        self.start = [start]

    def write(self, numbers: Iterable[int], prompts: dict[int, list[int]] | None = None) -> Iterator[Document]:
        """Documents of these numbers, in the order in which they are finished.

        Args:
            prompts: the tokens that the documents of some numbers begin with, instead of what the model writes itself.
        """
        numbers, prompts = iter(numbers), prompts or {}
        writing: dict[int, _Turn] = {}
        while True:
            room = 2 * self.engine.config.max_num_seqs - len(writing)
            for _, number in zip(range(room), numbers, strict=False):
                self._submit(writing, self._first(number, prompts.get(number)))
            if not writing:
                return
            for output in self.engine.step():
                turn = writing[output.id]
                turn.tokens += output.tokens
                if output.finish_reason:
                    del writing[output.id]
                    ended = self._end(turn, output.finish_reason)
                    if isinstance(ended, Document):
                        yield ended
                    else:
                        self._submit(writing, ended)

    def _submit(self, writing: dict[int, _Turn], turn: _Turn) -> None:
        limit = self.settings.user_tokens if turn.user else self.settings.answer_tokens
        limit = min(limit, self.engine.max_model_len - len(turn.prompt))
        sampling = SamplingParams(temperature=1.0 if turn.user else self._temperature(turn.number))
        seed = derive_key(self.settings.seed, "user" if turn.user else "answer", turn.number)
        writing[self.engine.submit(Request(turn.prompt, limit, seed, self.stop_ids, sampling=sampling))] = turn

    def _first(self, number: int, prompt: list[int] | None) -> _Turn:
        if prompt is not None:
            return _Turn(number, prompt, user=False)
        return _Turn(number, self.frame.opening if self.frame else self.start, user=self.frame is not None)

    def _end(self, turn: _Turn, reason: str) -> Document | _Turn:
        """What follows a turn: the answer after the user's, the whole document after the answer."""
        temperature = self._temperature(turn.number)
        if not turn.tokens:
            return Document(turn.number, temperature=temperature, dropped="empty turn")
        if not turn.user:
            if repetition(turn.tokens) > self.settings.repetition:
                return Document(turn.number, temperature=temperature, dropped="repetition")
            return Document(turn.number, turn.prompt + turn.tokens, temperature)
        if reason != "stop":
            return Document(turn.number, temperature=temperature, dropped="endless turn")
        assert self.frame is not None
        if len(turn.prompt) + len(turn.tokens) + len(self.frame.middle) >= self.engine.max_model_len:
            return Document(turn.number, temperature=temperature, dropped="endless turn")
        return _Turn(turn.number, turn.prompt + turn.tokens + self.frame.middle, user=False)

    def _temperature(self, number: int) -> float:
        choices = self.settings.temperatures
        return choices[derive_key(self.settings.seed, "temperature", number) % len(choices)]


@dataclass
class _Turn:
    number: int
    prompt: list[int]
    user: bool
    tokens: list[int] = field(default_factory=list)


def repetition(tokens: list[int]) -> float:
    """The share of 8-token phrases that occurred before in the same tokens; 0 for fewer than 9 tokens."""
    phrases = Counter(tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1))
    total = phrases.total()
    return 1 - len(phrases) / total if total > 1 else 0.0
