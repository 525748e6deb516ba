"""Which special tokens stand around a text, for all that continue prompts."""

from __future__ import annotations

from typing import Any


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that is to be continued.

    What the tokenizer puts before a text (a BOS or [CLS]) stays. What it puts behind one (an EOS or [SEP]) says that the text
    has ended, so it is left out.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded.input_ids), encoded.special_tokens_mask
    while ids and added[len(ids) - 1]:
        ids.pop()
    return ids


def end_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer ends a text with: its EOS, or the separator of BERT's kind, which has no EOS."""
    ids = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return [id for id in ids if id is not None][:1]
