"""Incremental detokenizer: token ids come k at a time, text goes out, and the first stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """The text that some tokens added."""

    text: str
    """It may be shorter than what the tokens decode to: an incomplete character, or text that may be the beginning of a
    stop string, is held back until later tokens decide."""
    tokens: int
    """How many of the tokens count. Tokens after the one that completes a stop string do not."""
    stopped: bool
    """Whether a stop string was found. No more tokens may be pushed then."""


class TextStream:
    """The text of one continuation. `push` adds tokens; `flush` returns what is still held back at the end.

    Args:
        tokenizer: a tokenizer of transformers; only its `decode` is called.
        stops: stop strings. The text ends before the first that is completed.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.read = self.prefix = 0
        """The text of `ids[:read]` has been returned. Decoding starts at `prefix`, a little before `read`, because
        tokenizers drop the space of the first token that they decode."""
        self.held = ""
        self.stop: str | None = None
        """The stop string that was found."""

    def push(self, ids: list[int]) -> Piece:
        """Add tokens and return the new text."""
        if not self.stops:
            self.ids += ids
            return Piece(self._new_text(), len(ids), False)
        text = ""
        # One token at a time, because the piece must say which token completed the stop string.
        for count, id in enumerate(ids, start=1):
            self.ids.append(id)
            self.held += self._new_text()
            found = min(((i, stop) for stop in self.stops if (i := self.held.find(stop)) >= 0), default=None)
            if found is not None:
                text, self.held, self.stop = text + self.held[: found[0]], "", found[1]
                return Piece(text, count, True)
            keep = self._may_begin_a_stop()
            text, self.held = text + self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return Piece(text, len(ids), False)

    def flush(self) -> str:
        """Return the text that was held back. Call it when no more tokens follow."""
        text, self.held = self.held + self._new_text(final=True), ""
        return text

    def _new_text(self, final: bool = False) -> str:
        """The text of the ids since the last call, without a character whose bytes are still incomplete."""
        before = self.tokenizer.decode(self.ids[self.prefix : self.read], skip_special_tokens=True)
        now = self.tokenizer.decode(self.ids[self.prefix :], skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return now[len(before) :] if final else ""
        self.prefix, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def _may_begin_a_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self.stops)) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stops):
                return n
        return 0
