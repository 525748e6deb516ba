"""Token ids → text as they come, cut at the first stop string, with the tokens counted that the text needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """What some tokens added."""

    text: str
    """May be less than the tokens say: characters that are not whole yet, or that may begin a stop string, wait."""
    tokens: int
    """How many of the tokens count: those after the one that completes a stop string do not."""
    stopped: bool
    """Whether a stop string came; nothing may follow."""


class TextStream:
    """Text of one continuation. Keeps what it holds back until `push` can tell, or `flush` says that no more comes."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.read = self.prefix = 0
        """Ids before `read` are in the text; decoding starts at `prefix`, so that spacing comes out as in one piece."""
        self.held = ""
        self.stop: str | None = None
        """The stop string that came."""

    def push(self, ids: list[int]) -> Piece:
        """Add tokens."""
        if not self.stops:
            self.ids += ids
            return Piece(self._new_text(), len(ids), False)
        text = ""
        # One by one: the count has to be that of the token that completes a stop.
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
        """What was held back, once no more tokens come."""
        text, self.held = self.held + self._new_text(final=True), ""
        return text

    def _new_text(self, final: bool = False) -> str:
        """Text of the ids since the last call, but for a character whose bytes have not all come."""
        before = self.tokenizer.decode(self.ids[self.prefix : self.read], skip_special_tokens=True)
        now = self.tokenizer.decode(self.ids[self.prefix :], skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return now[len(before) :] if final else ""
        self.prefix, self.read = self.read, len(self.ids)
        return now[len(before) :]

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        longest = max(map(len, self.stops)) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stops):
                return n
        return 0
