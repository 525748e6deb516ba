"""From the body of an HTTP request to requests of the engine: prompts are tokenised, and fields become parameters."""

from __future__ import annotations

import secrets
from typing import Any

from kforcing.engine import Request, SamplingParams
from kforcing.noise import choice_seed
from serve.models import ServedModel
from serve.protocol.errors import ApiError
from serve.protocol.requests import MAX_CHOICES, ChatRequest, CompletionRequest

CHARACTERS_PER_TOKEN = 100
"""A prompt with more characters than this per token of context is refused before it is tokenised."""
DEFAULT_MAX_TOKENS = 16
"""`max_tokens` of a completion request that leaves it out, as in OpenAI's API. Chat requests have no default."""


def engine_requests(model: ServedModel, body: CompletionRequest | ChatRequest) -> list[Request]:
    """One request of the engine for each choice: `n` for each prompt, in order.

    Without a seed, each prompt gets a random one. Raises ApiError with status 400 for a prompt that cannot be tokenised or
    for too many choices.
    """
    chat = isinstance(body, ChatRequest)
    prompts = _chat_prompts(model, body) if isinstance(body, ChatRequest) else _prompts(model, body)
    copies = body.n or 1
    if len(prompts) * copies > MAX_CHOICES:
        message = f"{len(prompts)} prompts × n={copies} exceed {MAX_CHOICES} choices; send several requests"
        raise ApiError(400, message, "n")
    stop_ids = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else model.eos)
    sampling = _sampling(body)
    requests = []
    for prompt in prompts:
        room = max(model.engine.max_model_len - len(prompt), 1)
        limit = body.token_limit or (None if chat else min(DEFAULT_MAX_TOKENS, room))
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests += [
            Request(prompt, limit, choice_seed(seed, i), stop_ids, body.k, sampling, body.acceptance)
            for i in range(copies)
        ]
    return requests


def _sampling(body: CompletionRequest | ChatRequest) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
    )


def _prompts(model: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [_encode(model, prompt) if isinstance(prompt, str) else prompt for prompt in given]


def _chat_prompts(model: ServedModel, body: ChatRequest) -> list[list[int]]:
    """Token ids of the conversation, as the only prompt."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise ApiError(400, f"{model.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
    try:
        text = model.tokenizer.apply_chat_template(
            [message.for_template() for message in body.messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template may raise anything, for example about the order of roles
        raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
    return [_encode(model, text, add_special_tokens=False)]


def _encode(model: ServedModel, text: str, **options: Any) -> list[int]:
    context = model.engine.max_model_len
    if len(text) > CHARACTERS_PER_TOKEN * context:  # tokenising it would delay the other requests
        message = f"a prompt of {len(text)} characters exceeds the context of {context} tokens"
        raise ApiError(400, message, "prompt")
    try:
        ids: list[int] = model.tokenizer(text, **options).input_ids
    except (UnicodeError, TypeError):
        raise ApiError(400, "the prompt is not valid Unicode; does it contain a lone surrogate?", "prompt") from None
    if not ids:
        raise ApiError(400, "the prompt has no tokens", "prompt")
    return ids
