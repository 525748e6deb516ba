"""Documents → token ids, in bounded memory, with what a document spells out taken as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from kforcing.prompts import end_ids
from pipelines.config.section import ConfigError

PIECE = 1 << 16
"""The most characters that are encoded at once of a document: tokenizers take some hundred bytes for each."""
_BATCH = 1 << 20
"""Characters of the documents that are encoded by one call."""
_CONTEXT = 64
"""Characters on both sides of a seam that show whether it changes tokens."""
_TRIES = 8
_WORD = 1000


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: EOS, or the separator of BERT-style vocabularies. Raises ConfigError without either."""
    if ids := end_ids(tokenizer):
        return ids[0]
    raise ConfigError(f"tokenizer {tokenizer.name_or_path} has neither an EOS nor a separator token; add one to it")


def special_spellings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What the special tokens of a tokenizer look like in a text."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def bounded_words(text: str) -> Iterator[str]:
    """The text, cut where a word reaches `_WORD` characters: the time to learn merges from a word grows with its square."""
    start = 0
    for match in re.finditer(rf"\S{{{_WORD}}}", text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: bool) -> list[np.ndarray]:
    """The int32 ids of each text, without tokens that the tokenizer would add.

    Args:
        special_tokens: encode a special token that is spelled out, like `<|endoftext|>`, as that token, and not as text.
    """

    def encode(pieces: list[str]) -> list[list[int]]:
        return tokenizer(
            pieces,
            add_special_tokens=False,
            split_special_tokens=not special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    ids: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in texts]
    for batch in _batches(texts, encode):
        encoded = encode([piece for _, piece in batch])
        for (document, _), piece_ids in zip(batch, encoded, strict=True):
            ids[document].append(np.asarray(piece_ids, np.int32))
    return [np.concatenate(pieces) for pieces in ids]


_Encode = Callable[[list[str]], list[list[int]]]


def _batches(texts: list[str], encode: _Encode) -> Iterator[list[tuple[int, str]]]:
    """(document, piece of its text) in batches of about `_BATCH` characters."""
    ends = 0

    def batch_of(item: tuple[int, str]) -> int:
        nonlocal ends
        ends += len(item[1])
        return ends // _BATCH

    pieces = ((document, piece) for document, text in enumerate(texts) for piece in _pieces(text, encode))
    for _, batch in groupby(pieces, batch_of):
        yield list(batch)


def _pieces(text: str, encode: _Encode) -> Iterator[str]:
    """The text in pieces of at most `PIECE` characters, cut where the tokens of the pieces are those of the text.

    Where there is no such place, as in a text without blanks, it is cut after `PIECE` characters.
    """
    start = 0
    while len(text) - start > PIECE:
        end, following = _seam(text, start + PIECE, encode)
        yield text[start:end]
        start = following
    yield text[start:]


def _seam(text: str, limit: int, encode: _Encode) -> tuple[int, int]:
    """Where a piece ends and the next begins: at a blank, which the next piece begins with, or which a tokenizer that adds
    one in front of a text puts there itself.
    """
    place = limit
    for _ in range(_TRIES):
        place = max(text.rfind(blank, limit - PIECE // 2, place) for blank in " \n")
        if place < 0:
            break
        left, right = text[place - _CONTEXT : place], text[place : place + _CONTEXT]
        whole, head, kept, dropped = encode([left + right, left, right, right[1:]])
        if head + kept == whole:
            return place, place
        if head + dropped == whole:
            return place, place + 1
    return limit, limit
