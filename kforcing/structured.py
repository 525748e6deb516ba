"""Structured output: a grammar says which tokens may come next, so that every text has the form that was asked for.

The mask of a position depends on the grammar and on the tokens made so far, and on nothing else. The AR model draws from its
masked distribution at each position, and exact mode keeps the drafts that equal those draws: the text is what AR decoding
under the same masks gives. Grammars are those of llguidance (`pip install llguidance`).
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = 64
"""Grammars that are kept compiled."""
LIMITS: Any = {"max_items_in_row": 500, "step_max_items": 20_000}
"""Bounds of the work for one token, so that an ambiguous grammar does not hold up other requests."""
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as `json.dumps` writes it: a model that may add blanks can go on with blanks for ever."""


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of a text, by exactly one field. The names are vLLM's."""

    json: str | Mapping[str, Any] | None = None
    """A JSON schema; the text is a JSON document that it allows."""
    json_object: bool = False
    """The text is a JSON object."""
    regex: str | None = None
    """The whole text matches this regular expression (Rust's syntax)."""
    choice: Sequence[str] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """The text is derived from `start` of this Lark grammar."""

    def source(self) -> str:
        """The grammar in the words of llguidance. Raises ValueError for a form that is not valid."""
        from llguidance import LLMatcher

        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs need one of json, json_object, regex, choice and grammar, not {given}"
            )
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            if not self.choice or not all(self.choice):
                raise ValueError("choice must be a list of texts, none of them empty")
            # A string of Lark has the escapes of JSON.
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in self.choice))
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(self.grammar)
        schema: Any = {"type": "object"} if self.json_object else self.json
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the schema is not JSON: {error}") from None
        if not isinstance(schema, Mapping):
            raise ValueError("a JSON schema must be an object")
        return LLMatcher.grammar_from_json_schema(dict(schema), {**JSON_STYLE})


class Grammars:
    """Compiles grammars for the tokens of one model, and keeps the latest `KEPT` of them. Threads may share it.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: rows of the model's LM head, which may be more than the tokenizer has tokens.
        eos_ids: tokens that end a text; they are allowed where the text is complete.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Iterable[int]):
        self.tokenizer, self.vocabulary, self.eos_ids = tokenizer, vocabulary, frozenset(eos_ids)
        self._tokens: Any = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """The grammar of a form; the first one takes about a second more.

        Raises:
            ValueError: for a form that is not valid or that llguidance does not know, and where structured outputs are
                impossible: without llguidance, a fast tokenizer or EOS.
        """
        if find_spec("llguidance") is None:
            raise ValueError(
                "structured outputs need the package llguidance, which is not installed here; run `pip install llguidance`"
            )
        if not self.eos_ids:
            raise ValueError("structured outputs end with EOS, and this model has no EOS token")
        with self._lock:
            source = wanted.source()
            if source not in self._kept:
                self._kept[source] = self._compiled(source)
            self._kept.move_to_end(source)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[source]

    def _compiled(self, source: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits
        from llguidance.hf import from_tokenizer

        if self._tokens is None:
            if not getattr(self.tokenizer, "is_fast", False):
                raise ValueError("structured outputs need a fast tokenizer of transformers (one with a tokenizer.json)")
            try:
                self._tokens = from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=sorted(self.eos_ids))
            except ValueError as error:
                raise ValueError(f"structured outputs do not work with this tokenizer: {error}") from None
        limits = LLParserLimits(**LIMITS)
        failed, messages = LLMatcher.validate_grammar_with_warnings(source, self._tokens, limits=limits)
        if failed:
            raise ValueError("the form of a structured output is not possible: " + " ".join(messages[0].split()))
        return Grammar(LLMatcher(self._tokens, source, log_level=0, limits=limits), self.eos_ids, self.vocabulary)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar."""

    state: Any
    """llguidance's matcher at the start of a text. It is copied, never changed."""
    eos_ids: frozenset[int]
    vocabulary: int

    def matcher(self) -> Matcher:
        """The grammar at the start of a new text."""
        return Matcher(self)


class Matcher:
    """A grammar along one text.

    It stands behind the tokens of the last call and goes back to where the next ones differ, so that rejected drafts cost
    nothing but their own tokens.
    """

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self._state = grammar.state.deep_copy()
        self._read: list[int] = []
        self._warned = False

    def allowed(self, tokens: list[int]) -> Tensor:
        """(V,) bool on the CPU: what may follow these tokens of the text.

        Where the text is complete only EOS may follow, and so it is where a token takes more work than `LIMITS` allow: a
        warning says that the text is cut. Behind EOS, and behind a draft that the grammar does not allow, everything may:
        such tokens are never kept.
        """
        same = len(self._read)
        if tokens[:same] != self._read:
            same = next((i for i, (a, b) in enumerate(zip(self._read, tokens, strict=False)) if a != b), len(tokens))
            self._state.rollback(len(self._read) - same)
            del self._read[same:]
        new = tokens[same:]
        if not self.grammar.eos_ids.isdisjoint(new):
            return torch.ones(self.grammar.vocabulary, dtype=torch.bool)
        read = self._state.try_consume_tokens(new)
        self._read += new[:read]
        mask = None
        if read == len(new) and not self._state.is_stopped():
            mask = torch.frombuffer(bytearray(self._state.compute_logit_bias()), dtype=torch.uint8) > 0
        if self._state.is_error():
            self._begin_again()
        elif read < len(new):
            return torch.ones(self.grammar.vocabulary, dtype=torch.bool)
        elif mask is not None and mask.any():
            return mask
        only_eos = torch.zeros(self.grammar.vocabulary, dtype=torch.bool)
        only_eos[list(self.grammar.eos_ids)] = True
        return only_eos

    def _begin_again(self) -> None:
        """Go back to the start of the text: a matcher with an error does not leave it by going back less."""
        if not self._warned:
            why = " ".join(self._state.get_error().split())[:200]
            log.warning("a structured output takes too much work for one token and is cut: %s", why)
        self._warned = True
        self._state, self._read = self.grammar.state.deep_copy(), []
