"""Text from token ids that come k at a time: what they add to the prompt's text, and the first stop string, which ends it.

The pieces of a continuation add up to one `decode` of the prompt and the continuation, without the prompt's text. Decoders
treat the first token that they see in a way of its own (they drop its space, or keep the ## of a word's continuation), so new
tokens are always decoded behind some of the tokens before them, first of all those of the prompt.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 8
"""How many of the last tokens of a prompt the first new one is decoded behind."""
WAITING = 16
"""How many tokens may wait for the rest of a character. It has at most 4 bytes, so more of them are not valid text."""
INCOMPLETE = "\ufffd"
"""What a decoder gives for the bytes of a character that has not ended yet."""


class Detokenizer:
    """A tokenizer of transformers as what turns ids into text. Special tokens, such as EOS, have none unless kept."""

    def __init__(self, tokenizer: Any, keep_special: bool = False):
        self.tokenizer, self.keep_special = tokenizer, keep_special
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(i for i, token in added if token.special) | set(tokenizer.all_special_ids)
        self._tokens: dict[int, tuple[str, bytes]] = {}

    def visible(self, ids: Sequence[int]) -> list[int]:
        """The ids that have a text."""
        return [id for id in ids if self.keep_special or id not in self.special_ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids alone."""
        options = {"skip_special_tokens": not self.keep_special, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that the ids add to that of the prompt."""
        stream = TextStream(self, prompt=prompt)
        return stream.push(ids).text + stream.flush().text

    def token(self, id: int) -> tuple[str, bytes]:
        """A token's text inside of a text, and its bytes. A part of a character has the text `bytes:\\x…`, like OpenAI's."""
        if id not in self._tokens:
            self._tokens[id] = self._token(id)
        return self._tokens[id]

    def _token(self, id: int) -> tuple[str, bytes]:
        before = self.tokenizer("a", add_special_tokens=False).input_ids
        name = str(self.tokenizer.convert_ids_to_tokens(id) or "")
        text = name if id in self.special_ids else self.decode([*before, id])[len(self.decode(before)) :]
        if INCOMPLETE not in text:
            return text, text.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            data = bytes.fromhex(byte[1])
        else:  # a byte-level vocabulary writes each byte as a character of its own
            bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
            data = bytes(bytes_of.get(character, ord("?")) for character in name)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def split_stops(self, stops: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """Stop strings to look for in the text, and those that are special tokens, by their ids.

        Raises:
            ValueError: when a special token is only a part of a stop string: it would never occur in the text.
        """
        if self.keep_special:
            return list(stops), {}
        special = {i: str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.special_ids}
        ids = {i: text for i, text in special.items() if text in stops}
        texts = [stop for stop in stops if stop not in ids.values()]
        for stop in texts:
            if part := next((text for text in special.values() if text in stop), None):
                raise ValueError(
                    f"stop={stop!r} contains the special token {part}, which has no text; use {part} alone as a stop string"
                )
        return texts, ids


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

    The work and the memory for a token do not grow with the number of tokens before it.

    Args:
        detokenizer: of the model.
        stops: stop strings. The text ends before the first that is completed.
        prompt: the ids that the continuation follows.
        min_tokens: no stop string is looked for in the text of so many tokens.
        include_stop: the text ends behind the stop string.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ):
        self.detokenizer, self.stops = detokenizer, tuple(stops)
        self.early, self.include_stop = min_tokens, include_stop
        self.held = ""
        self.stop: str | None = None
        """The stop string that was found."""
        # New tokens are decoded behind tokens whose text has been returned.
        self._before, self._before_text = self._end_of(prompt)
        self._new: list[int] = []

    def push(self, ids: Sequence[int]) -> Piece:
        """Add tokens and return the new text."""
        if not self.stops:
            return Piece(self._add(ids), len(ids), False)
        text = ""
        # One token at a time, because the piece must say which token completed the stop string.
        for count, id in enumerate(ids, start=1):
            self.held += self._add([id])
            if self.early > 0:
                self.early -= 1
                text += self._release(0)
                continue
            if self._find_stop():
                return Piece(text + self._release(0), count, True)
            text += self._release(self._may_begin_a_stop())
        return Piece(text, len(ids), False)

    def flush(self) -> Piece:
        """Return the text that was held back. Call it when no more tokens follow."""
        self.held += self._add([], final=True)
        stopped = self._find_stop()
        return Piece(self._release(0), 0, stopped)

    def _find_stop(self) -> bool:
        """Whether the held text contains a stop string; the text then ends there."""
        found = min(((i, stop) for stop in self.stops if (i := self.held.find(stop)) >= 0), default=None)
        if found is not None:
            at, self.stop = found
            self.held = self.held[: at + len(self.stop) if self.include_stop else at]
        return found is not None

    def _release(self, keep: int) -> str:
        """The held text without its last `keep` characters, which are held on."""
        end = len(self.held) - keep
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _add(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that tokens add, as long as it is not `final` without a character whose bytes are incomplete."""
        self._new += self.detokenizer.visible(ids)
        if not self._new:
            return ""
        decode, wait = self.detokenizer.decode, not final and len(self._new) < WAITING
        ready = len(self._new)
        text = decode([*self._before, *self._new])
        while wait and text.endswith(INCOMPLETE):  # the last tokens wait for the rest of their character
            ready -= 1
            if not ready:
                return ""
            text = decode([*self._before, *self._new[:ready]])
        new, self._new = self._new[:ready], self._new[ready:]
        # The new tokens may complete a character that the tokens before them have begun.
        same = (a == b for a, b in zip(text, self._before_text, strict=False))
        added = text[sum(itertools.takewhile(bool, same)) :]
        if added:
            alone = decode(new)
            self._before = new if alone else [*self._before, *new][-CONTEXT:]
            self._before_text = alone or decode(self._before)
        elif wait:  # some decoders give a token a text when they see the next one
            self._new = new + self._new
        return added

    def _end_of(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """The last tokens of the prompt that have a text, from the beginning of a character on, and that text."""
        ids = self.detokenizer.visible(prompt[-8 * CONTEXT :])[-CONTEXT:]
        for start in range(min(4, len(ids))):
            text = self.detokenizer.decode(ids[start:])
            if not text.startswith(INCOMPLETE):
                return ids[start:], text
        return [], ""

    def _may_begin_a_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self.stops)) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stops):
                return n
        return 0
