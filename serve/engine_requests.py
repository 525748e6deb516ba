"""From the body of an HTTP request to requests of the engine: prompts are tokenised, and fields become parameters."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from kforcing.engine import Request, SamplingParams
from kforcing.noise import choice_seed
from kforcing.prompts import prompt_ids
from serve.models import ServedModel
from serve.protocol.errors import ApiError
from serve.protocol.requests import MAX_CHOICES, ChatRequest, CompletionRequest, Message

CHARACTERS_PER_TOKEN = 100
"""A prompt with more characters than this per token of context is refused before it is tokenised."""
DEFAULT_MAX_TOKENS = 16
"""`max_tokens` of a completion request that leaves it out, as in OpenAI's API. Chat requests have no default."""


@dataclass(frozen=True)
class Choices:
    """What the choices of a request ask of the engine and of the detokenizer."""

    requests: list[Request]
    """One for each choice: `n` for each prompt, in order."""
    stops: list[str]
    """Stop strings to look for in the text."""
    special_stops: dict[int, str]
    """Stop strings that are special tokens, by their ids, which end the engine's requests."""
    echo: list[str] | None
    """The prompt of each choice, which comes before its text."""
    silent: bool
    """Return no token: the prompt alone is of interest."""


async def read_choices(model: ServedModel, body: CompletionRequest | ChatRequest, worker: Executor) -> Choices:
    """The choices that a body asks for. Prompts are tokenised one by one in the worker's thread, so that nothing else waits.

    Without a seed, each prompt gets a random one. Raises ApiError with status 400 for a prompt that cannot be tokenised, stop
    strings that cannot occur, or too many choices.
    """
    chat = isinstance(body, ChatRequest)
    given = [body] if isinstance(body, ChatRequest) else _given_prompts(body)
    copies = body.n or 1
    if len(given) * copies > MAX_CHOICES:
        message = f"{len(given)} prompts × n={copies} exceed {MAX_CHOICES} choices; send several requests"
        raise ApiError(400, message, "n")
    try:
        stops, special = model.detokenizer.split_stops(body.stop_strings)
    except ValueError as error:
        raise ApiError(400, str(error), "stop") from None
    stop_ids = frozenset([*(body.stop_token_ids or ()), *special, *(() if body.ignore_eos else model.eos)])
    sampling, loop = _sampling(body), asyncio.get_running_loop()
    requests: list[Request] = []
    for each in given:
        prompt = each if isinstance(each, list) else await loop.run_in_executor(worker, _prompt, model, each)
        _check_length(model.engine.max_model_len, len(prompt), body)
        room = max(model.engine.max_model_len - len(prompt), 1)
        limit = None if chat else min(DEFAULT_MAX_TOKENS, room)
        if body.token_limit is not None:
            limit = max(body.token_limit, 1)  # the engine makes at least one token
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests += [
            Request(prompt, limit, choice_seed(seed, i), stop_ids, body.k, sampling, body.acceptance)
            for i in range(copies)
        ]
    echo = None
    if isinstance(body, CompletionRequest) and body.echo:
        echo = [text for text in _prompt_texts(model, body) for _ in range(copies)]
    return Choices(requests, stops, special, echo, silent=body.token_limit == 0)


def field_of(error: ValueError, body: CompletionRequest | ChatRequest) -> str | None:
    """The field that an error of the engine names first, as in `k=9 tokens …` or `prompt token 7 …`."""
    word = re.match(r"(\w+)[= ]", str(error))
    return word[1] if word and word[1] in type(body).model_fields else None


def _check_length(context: int, prompt: int, body: CompletionRequest | ChatRequest) -> None:
    """Raise ApiError for a prompt of so many tokens that does not fit, in the words by which clients recognise this error."""
    new = body.token_limit or 1
    if prompt + new <= context:
        return
    field = "messages" if isinstance(body, ChatRequest) else "prompt"
    message = (
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + new} tokens ({prompt} "
        f"in the {field}, {new} in the completion). Please reduce the length of the {field} or completion."
    )
    limit = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    raise ApiError(400, message, field if prompt >= context else limit, "context_length_exceeded")


def _sampling(body: CompletionRequest | ChatRequest) -> SamplingParams:
    logprobs, prompt_logprobs = body.logprob_counts
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _given_prompts(body: CompletionRequest) -> list[Any]:
    """Each prompt, as text or token ids."""
    given: Any = body.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _prompt_texts(model: ServedModel, body: CompletionRequest) -> list[str]:
    """The text of each prompt."""
    return [given if isinstance(given, str) else model.detokenizer.decode(given) for given in _given_prompts(body)]


def _prompt(model: ServedModel, given: str | ChatRequest) -> list[int]:
    """The token ids of a text or of a conversation."""
    if isinstance(given, str):
        _check_characters(model, len(given), "prompt")
        return _tokenised("prompt", lambda: prompt_ids(model.tokenizer, given))
    if not getattr(model.tokenizer, "chat_template", None):
        raise ApiError(400, f"{model.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
    _check_characters(model, sum(len(message.text) for message in given.messages), "messages")
    text = _rendered(model.tokenizer, given.messages)  # templates write the special tokens themselves
    return _tokenised("messages", lambda: model.tokenizer(text, add_special_tokens=False).input_ids)


def _rendered(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation in the form of the chat template. Raises ApiError where the template would leave something out."""

    def render(names: bool) -> str:
        turns = [
            {"role": role_in_template(message.role), "content": message.text}
            | ({"name": message.name} if names and message.name else {})
            for message in messages
        ]
        try:
            return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template may raise anything, for example about the order of roles
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None

    def role_in_template(role: str) -> str:
        """OpenAI's newer name of the system's role is `developer`; few templates know it."""
        return "system" if role == "developer" and "developer" not in str(tokenizer.chat_template) else role

    text = render(names=True)
    named = next((i for i, message in enumerate(messages) if message.name), None)
    if named is not None and text == render(names=False):
        raise ApiError(400, "the model's chat template has no place for names", f"messages[{named}].name")
    at = 0  # most templates keep the order of the messages, so the next one is not far
    for i, message in enumerate(messages):
        content = message.text.strip()
        at = max(text.find(content, at), 0)
        # Templates may shorten what the assistant said, for example by its reasoning.
        if message.role != "assistant" and not at and content not in text:
            what = f"the model's chat template leaves out this message of the role {message.role}"
            raise ApiError(400, what, f"messages[{i}]")
    return text


def _check_characters(model: ServedModel, characters: int, field: str) -> None:
    """Refuse what would take long to tokenise and can never fit the context."""
    context = model.engine.max_model_len
    if characters > CHARACTERS_PER_TOKEN * context:
        message = (
            f"This model's maximum context length is {context} tokens, and {characters} characters are more than that. "
            f"Please reduce the length of the {field}."
        )
        raise ApiError(400, message, field, "context_length_exceeded")


def _tokenised(field: str, tokenise: Callable[[], list[int]]) -> list[int]:
    try:
        ids = tokenise()
    except (UnicodeError, TypeError):
        raise ApiError(400, "the prompt is not valid Unicode; does it contain a lone surrogate?", field) from None
    if not ids:
        raise ApiError(400, "the prompt has no tokens", field)
    return ids
