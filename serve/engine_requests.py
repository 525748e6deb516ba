"""From the body of an HTTP request to requests of the engine: prompts are tokenised, and fields become parameters."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from kforcing.detokenizer import Detokenizer
from kforcing.engine import Request, SamplingParams
from kforcing.noise import choice_seed
from kforcing.prompts import prompt_ids
from kforcing.structured import Grammar, StructuredOutputs
from serve.models import ServedModel
from serve.protocol.errors import ApiError
from serve.protocol.requests import MAX_CHOICES, ChatRequest, CompletionRequest, Message
from serve.protocol.tools import Function
from serve.tool_calls import (
    LLAMA,
    ToolUse,
    call_text,
    definition,
    knows_tools,
    tool_format,
    tools_grammar,
    tools_prompt,
)

CHARACTERS_PER_TOKEN = 100
"""A prompt with more characters than this per token of context is refused before it is tokenised."""
DEFAULT_MAX_TOKENS = 16
"""`max_tokens` of a completion request that leaves it out, as in OpenAI's API. Chat requests have no default."""


@dataclass(frozen=True)
class Choices:
    """What the choices of a request ask of the engine and of the detokenizer."""

    requests: list[Request]
    """One for each choice: `n` for each prompt, in order."""
    detokenizer: Detokenizer
    stops: list[str]
    """Stop strings to look for in the text."""
    special_stops: dict[int, str]
    """Stop strings that are special tokens, by their ids, which end the engine's requests."""
    echo: list[str] | None
    """The prompt of each choice, which comes before its text."""
    min_tokens: int
    """No stop string is looked for in the text of so many tokens."""
    include_stop: bool
    """The text ends behind the stop string."""
    silent: bool
    """Return no token: the prompt alone is of interest."""
    tools: ToolUse | None
    """How the answers may call tools, if there are any."""


async def read_choices(model: ServedModel, body: CompletionRequest | ChatRequest, worker: Executor) -> Choices:
    """The choices that a body asks for. Prompts are tokenised one by one in the worker's thread, so that nothing else waits.

    Without a seed, each prompt gets a random one. Raises ApiError with status 400 for a prompt that cannot be tokenised, stop
    strings that cannot occur, or too many choices.
    """
    given, copies = _given_prompts(body), body.n or 1
    if len(given) * copies > MAX_CHOICES:
        message = f"{len(given)} prompts × n={copies} exceed {MAX_CHOICES} choices; send several requests"
        raise ApiError(400, message, "n")
    detokenizer = model.literal if body.skip_special_tokens is False else model.detokenizer
    try:
        stops, special = detokenizer.split_stops(body.stop_strings)
    except ValueError as error:
        raise ApiError(400, str(error), "stop") from None
    stop_ids = frozenset([*(body.stop_token_ids or ()), *special, *(() if body.ignore_eos else model.eos)])
    sampling = _sampling(body)
    tools = _tools(model, body)
    prompts = [await _token_ids(model, body, each, worker) for each in given]
    grammar = await _grammar(model, body, tools, worker)
    requests: list[Request] = []
    for prompt in prompts:
        limit = _token_limit(model.engine.max_model_len - len(prompt), body)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests += [
            Request(prompt, limit, choice_seed(seed, i), stop_ids, body.k, sampling, body.acceptance, grammar)
            for i in range(copies)
        ]
    echo = None
    if isinstance(body, CompletionRequest) and body.echo:
        as_given = [each if isinstance(each, str) and not body.truncate_prompt_tokens else None for each in given]
        echo = [as_given[i // copies] or detokenizer.decode(request.prompt) for i, request in enumerate(requests)]
    include_stop, silent = bool(body.include_stop_str_in_output), body.token_limit == 0
    return Choices(requests, detokenizer, stops, special, echo, sampling.min_tokens, include_stop, silent, tools)


def count_choices(body: CompletionRequest | ChatRequest) -> int:
    """How many choices a body asks for."""
    return len(_given_prompts(body)) * (body.n or 1)


def _tools(model: ServedModel, body: CompletionRequest | ChatRequest) -> ToolUse | None:
    if not isinstance(body, ChatRequest) or not body.functions:
        return None
    names = frozenset(function.name for function in body.functions)
    form = tool_format(str(model.tokenizer.chat_template))
    parallel = body.parallel_tool_calls is not False and body.named is None and form is not LLAMA
    return ToolUse(form, names, body.named is not None, parallel)


async def _grammar(
    model: ServedModel, body: CompletionRequest | ChatRequest, tools: ToolUse | None, worker: Executor
) -> Grammar | None:
    """The grammar of the form that the answer has to have, compiled in the worker's thread."""
    form, field = body.form()
    if tools and isinstance(body, ChatRequest):
        if form is not None:
            raise ApiError(400, f"{field} and tools cannot be combined; send one of them", field)
        if body.must_call or any(function.strict for function in body.functions):
            functions = [each for each in body.functions if body.named in (None, each.name)]
            field = "tools"
            form = StructuredOutputs(grammar=tools_grammar(functions, tools.form, body.must_call, tools.parallel))
    if form is None:
        return None
    try:
        return await asyncio.get_running_loop().run_in_executor(worker, model.grammars.compile, form)
    except ValueError as error:
        raise ApiError(400, str(error), field) from None


async def _token_ids(
    model: ServedModel, body: CompletionRequest | ChatRequest, given: Any, worker: Executor
) -> list[int]:
    """The ids of a prompt, which fit the context."""
    if isinstance(given, list) and isinstance(given[0], int):
        ids = given
    else:
        functions = body.functions if isinstance(body, ChatRequest) else []
        ids = await asyncio.get_running_loop().run_in_executor(worker, tokens_of, model, given, True, functions)
    ids = ids[-(body.truncate_prompt_tokens or len(ids)) :]
    _check_length(model.engine.max_model_len, len(ids), body)
    return ids


def _token_limit(room: int, body: CompletionRequest | ChatRequest) -> int | None:
    """How many tokens the engine makes at most, and at least one; None for all that there is room for."""
    if body.token_limit is not None:
        return max(body.token_limit, 1)
    return None if isinstance(body, ChatRequest) else min(DEFAULT_MAX_TOKENS, room)


def field_of(error: ValueError, body: CompletionRequest | ChatRequest) -> str | None:
    """The field that an error of the engine names first, as in `k=9 tokens …` or `prompt token 7 …`."""
    word = re.match(r"(\w+)[=\[ ]", str(error))
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
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        min_p=body.min_p or 0.0,
        logit_bias={int(id): bias for id, bias in (body.logit_bias or {}).items() if bias},
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _given_prompts(body: CompletionRequest | ChatRequest) -> list[Any]:
    """Each prompt: text, token ids, or the messages of a conversation."""
    if isinstance(body, ChatRequest):
        return [body.messages]
    given: Any = body.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def tokens_of(
    model: ServedModel,
    given: str | list[Message],
    add_special_tokens: bool = True,
    functions: Sequence[Function] = (),
) -> list[int]:
    """The token ids of a text to continue, or of a conversation with tools. Raises ApiError with status 400."""
    if isinstance(given, str):
        _check_characters(model, len(given), "prompt")
        if add_special_tokens:
            return _tokenised("prompt", lambda: prompt_ids(model.tokenizer, given))
        return _tokenised("prompt", lambda: model.tokenizer(given, add_special_tokens=False).input_ids)
    if not getattr(model.tokenizer, "chat_template", None):
        raise ApiError(400, f"{model.name} has no chat template; use /v1/completions", "messages", "no_chat_template")
    _check_characters(model, sum(len(message.text) for message in given), "messages")
    text = _rendered(model.tokenizer, given, [definition(function) for function in functions])
    _check_characters(model, len(text), "messages")
    # Templates write the special tokens themselves.
    return _tokenised("messages", lambda: model.tokenizer(text, add_special_tokens=False).input_ids)


def _rendered(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]]) -> str:
    """The conversation in the form of the chat template. Raises ApiError where the template would leave something out."""
    template = str(tokenizer.chat_template)
    turns = [_turn(message, template) for message in messages]
    if tools and not knows_tools(template):
        first = turns[0] if turns[0]["role"] == "system" else {"role": "system", "content": ""}
        told = {**first, "content": f"{tools_prompt(tools)}\n\n{first['content']}".strip()}
        turns = [told, *(turns[1:] if turns[0] is first else turns)]
    options: dict[str, Any] = {"tools": tools} if tools and knows_tools(template) else {}

    def render(names: bool) -> str:
        shown = turns if names else [{key: turn[key] for key in turn if key != "name"} for turn in turns]
        try:
            return str(tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False, **options))
        except Exception as error:  # a template may raise anything, for example about the order of roles
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None

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


def _turn(message: Message, template: str) -> dict[str, Any]:
    """A message as the chat template expects it; calls and their answers as text where it knows no tools."""
    role, content = message.role, message.text
    if role == "developer" and "developer" not in template:
        role = "system"  # `developer` is OpenAI's newer name, which few templates know
    turn: dict[str, Any] = {}
    if knows_tools(template):
        turn |= {"tool_calls": [call.for_template() for call in message.tool_calls]} if message.tool_calls else {}
        turn |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
    elif role == "tool":
        role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
    else:
        content = "\n".join([*filter(None, [content]), *map(call_text, message.tool_calls or ())])
    return {"role": role, "content": content, **({"name": message.name} if message.name else {}), **turn}


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
