"""How the texts of a model begin and end: one record beside it, `conventions.json`, which its tokenizer must fit.

It is written where a corpus is prepared and where a stage ends, and compared wherever the tokenizer is loaded again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from kforcing.generation import eos_ids
from kforcing.prompts import end_ids, prompt_ids

CONVENTIONS = "conventions.json"


def conventions_of(tokenizer: Any, config: GenerationConfig | None) -> dict[str, Any]:
    """What a tokenizer and the generation config of its model do, as JSON; tokens as {token: id}.

    `prompt_prefix`: special tokens before a prompt, such as a BOS or [CLS]. `text_suffix`: those that the tokenizer puts
    behind a text, and prompts leave out. `document_end`: what closes each document of a corpus. `eos`: all that end a
    text. `chat_template`: whether there is one.
    """

    def tokens(ids: Iterable[int]) -> dict[str, int]:
        return {str(tokenizer.convert_ids_to_tokens(i)): i for i in ids if 0 <= i < len(tokenizer)}

    text = tokenizer("a", return_special_tokens_mask=True)
    ids, prompt = list(text.input_ids), prompt_ids(tokenizer, "a")
    prefix = [i for i, special in zip(prompt, text.special_tokens_mask, strict=False) if special]
    ends = end_ids(tokenizer)
    return {
        "prompt_prefix": tokens(prefix),
        "text_suffix": tokens(ids[len(prompt) :]),
        "document_end": tokens(ends),
        "eos": tokens(sorted({*(eos_ids(config) if config else []), *ends})),
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }


def write_conventions(folder: Path, tokenizer: Any, config: GenerationConfig | None) -> None:
    """Write the record of a tokenizer and a generation config to a folder."""
    (folder / CONVENTIONS).write_text(json.dumps(conventions_of(tokenizer, config), indent=2) + "\n")


def check_conventions(folder: Path, tokenizer: Any, config: GenerationConfig | None) -> None:
    """Compare a folder's tokenizer and generation config with its record.

    Raises:
        ValueError: names the first thing that differs, or says that the record is cut.
    """
    file = folder / CONVENTIONS
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is empty or cut ({error}); put it back, or remove it to do without it") from None
    for name, now in conventions_of(tokenizer, config).items():
        if record.get(name, now) != now:
            raise ValueError(
                f"{name} of the tokenizer in {folder} is {now}, and was {record[name]} when the model was made; put its "
                f"files and generation_config.json back, or edit {file.name} if the change is meant"
            )
