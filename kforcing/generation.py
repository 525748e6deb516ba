"""`generate` with the arguments of transformers: how they become requests of the engine, and completions a tensor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from kforcing.engine import Completion, Request, SamplingParams
from kforcing.noise import choice_seed

HONOURED = {
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
}
HARMLESS = {"bos_token_id", "decoder_start_token_id", "use_cache", "transformers_version", "compile_config"}
"""Fields that a saved generation config often has and that have no influence on what is generated here."""
NEW_TOKENS = 20
"""The number of new tokens when the caller names no limit, as in transformers."""


def generation_settings(
    default: GenerationConfig, given: GenerationConfig | None, arguments: dict[str, Any]
) -> GenerationConfig:
    """The generation config of one call: its arguments, over `given`, over the model's own.

    Raises:
        ValueError: names an argument or field that the engine cannot honour.
    """
    settings = copy.deepcopy(default)
    chosen = {} if given is None else {name: value for name, value in _fields(given).items() if value is not None}
    unused = settings.update(**{**chosen, **arguments})
    neutral = GenerationConfig._get_default_generation_params()
    for name, value in {**_fields(settings), **unused}.items():
        if name not in HONOURED | HARMLESS and value not in (None, False, neutral.get(name)):
            raise ValueError(
                f"{name}={value!r} is not supported by PushForwardLM.generate; leave it out"
                + (f" or pass {name}={neutral[name]!r}, which is neutral" if name in neutral else "")
            )
    return settings


def _fields(config: GenerationConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def prompt_rows(input_ids: Tensor, attention_mask: Tensor | None, settings: GenerationConfig) -> list[list[int]]:
    """The token ids of each row without its padding on the left.

    Without a mask, pad tokens count as padding if they are not EOS as well, as in transformers.

    Raises:
        ValueError: for shapes that do not fit, a row without tokens, or padding that is not on the left.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} hold no prompts; expected (B, N) with N ≥ 1")
    if attention_mask is None:
        pad = settings.pad_token_id
        attention_mask = torch.ones_like(input_ids) if pad is None or pad in eos_ids(settings) else input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit input_ids of {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    for i, row in enumerate(mask.tolist()):
        if not row[-1] or row != sorted(row):
            raise ValueError(f"row {i} is not padded on the left; set tokenizer.padding_side='left'")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, mask, strict=True)]


def eos_ids(settings: GenerationConfig) -> list[int]:
    """The EOS ids of a generation config, of which there may be none, one or several."""
    ids: Any = settings.eos_token_id
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def new_token_limit(settings: GenerationConfig, width: int) -> int:
    """How many tokens to generate after prompts that are padded to `width` tokens."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    if settings.max_length is None:
        return NEW_TOKENS
    if settings.max_length <= width:
        raise ValueError(f"max_length={settings.max_length} leaves no room after prompts of {width} tokens; raise it")
    return settings.max_length - width


def make_requests(rows: list[list[int]], settings: GenerationConfig, limit: int, seed: int | None) -> list[Request]:
    """One request for each row and each of its `num_return_sequences` continuations, row by row.

    Without a seed, each row draws one from torch's global generator, so that `transformers.set_seed` repeats a call.
    """
    copies = settings.num_return_sequences or 1
    params = SamplingParams(temperature=0.0)
    if settings.do_sample:
        temperature = 1.0 if settings.temperature is None else settings.temperature
        params = SamplingParams(temperature, settings.top_k or 0, 1.0 if settings.top_p is None else settings.top_p)
    stop_ids = frozenset(eos_ids(settings))
    seeds = [int(torch.randint(2**62, ())) if seed is None else seed for _ in rows]
    return [
        Request(row, limit, choice_seed(row_seed, choice), stop_ids, sampling=params)
        for row, row_seed in zip(rows, seeds, strict=True)
        for choice in range(copies)
    ]


def with_continuations(input_ids: Tensor, done: Sequence[Completion], settings: GenerationConfig) -> Tensor:
    """Prompts and continuations, the latter with their EOS and padded on the right: (B · copies, N + new) int64."""
    ends = [completion.tokens + ([] if completion.stop_id is None else [completion.stop_id]) for completion in done]
    pad = next((i for i in (settings.pad_token_id, *eos_ids(settings)) if i is not None), 0)
    width = max(map(len, ends))
    new = torch.tensor([row + [pad] * (width - len(row)) for row in ends], device=input_ids.device)
    return torch.cat([input_ids.repeat_interleave(len(done) // len(input_ids), dim=0), new], dim=1)
