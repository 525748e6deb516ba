"""What clients receive: whole answers, the chunks of streams, and lists of models, in OpenAI's shapes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from serve.protocol.logprobs import ChatLogprobs, CompletionLogprobs
from serve.tool_calls import CallDelta


class Progress(NamedTuple):
    """How far the engine has come with some choices of a request."""

    tokens: int = 0
    """Tokens returned."""
    steps: int = 0
    """Forward passes."""
    drafts: int = 0
    """Exact mode: tokens that were drafted and verified."""
    accepted: int = 0
    """Exact mode: drafts that are equal to the AR model's own tokens."""
    cached: int = 0
    """Prompt tokens that were taken over from an earlier prompt."""


class PromptDetails(BaseModel):
    """What became of a prompt's tokens."""

    cached_tokens: int
    """Those that were taken over from an earlier prompt and not read again."""


class Decoding(BaseModel):
    """How many forward passes an answer took, summed over its choices."""

    steps: int
    """Forward passes."""
    tokens_a_step: float
    """Tokens returned for each forward pass; 0 before the first one."""
    draft_tokens: int
    """Exact mode: tokens that were drafted and verified."""
    accepted_draft_tokens: int
    """Exact mode: drafts that are equal to the AR model's own tokens."""


class Usage(BaseModel):
    """Numbers of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    decoding: Decoding
    """This endpoint's own field, beside OpenAI's."""


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    """The stop string or the stop token id that ended it; None if end-of-text or the token limit did."""


class CompletionResponse(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class CallOfFunction(BaseModel):
    """A function with its arguments as JSON."""

    name: str
    arguments: str


class CallOfTool(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CallOfFunction


class AssistantMessage(BaseModel):
    """The message that the model wrote."""

    role: Literal["assistant"]
    content: str | None
    """None for calls alone."""
    tool_calls: list[CallOfTool] | None = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None


class ChatResponse(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    k: int
    acceptance: Literal["exact", "fixed"]
    """Of requests that do not ask for one."""
    chat_template: bool
    """Whether it answers chats."""


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str]
    """The text of each token alone, as in `logprobs`."""


class Detokenized(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class Version(BaseModel):
    """The answer of /version."""

    version: str


class ResponseBuilder:
    """Builds the answer of one request, whole or in chunks, for completions or for chat completions."""

    def __init__(self, chat: bool, model: str):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _envelope(self, object: str, choices: list[Any], usage: Any) -> dict[str, Any]:
        own = {"id": self.id, "object": object, "created": self.created, "model": self.model}
        return own | {"choices": choices} | ({"usage": usage} if usage is not None else {})

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed.

        Args:
            choices: dictionaries with `index`, `text`, `calls`, `logprobs`, `finish_reason` and `stop_reason`.
        """
        written = []
        for choice in choices:
            text, calls = choice.pop("text"), choice.pop("calls")
            message = {"role": "assistant", "content": text}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            written.append(({"message": message} if self.chat else {"text": text}) | choice)
        return self._envelope("chat.completion" if self.chat else "text_completion", written, usage)

    def first_chunk(self, index: int) -> bytes:
        """The chunk before the first text of a choice: the role of the message, and nothing for completions."""
        return self.chunk(index, None, (), None, None, None, None) if self.chat else b""

    def chunk(
        self,
        index: int,
        text: str | None,
        calls: Iterable[CallDelta],
        logprobs: dict[str, Any] | None,
        finish: str | None,
        stop: str | int | None,
        usage: dict[str, Any] | None,
    ) -> bytes:
        """One server-sent event with what is new of a choice."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": ""} if text is None else {"content": text}
            if more := [call.as_delta() for call in calls]:
                choice["delta"] = ({"content": text} if text else {}) | {"tool_calls": more}
        else:
            choice["text"] = text or ""
        return self._event([choice], usage)

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The chunk with the usage of the whole request."""
        return self._event([], usage)

    def _event(self, choices: list[Any], usage: dict[str, Any] | None) -> bytes:
        body = self._envelope("chat.completion.chunk" if self.chat else "text_completion", choices, usage)
        return b"data: " + json.dumps(body).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


def usage(prompt: int, choices: Iterable[Progress]) -> dict[str, Any]:
    """The usage record of a request, see `Usage`."""
    total = Progress(*map(sum, zip(*choices, strict=True)))
    decoding = {
        "steps": total.steps,
        "tokens_a_step": total.tokens / max(total.steps, 1),
        "draft_tokens": total.drafts,
        "accepted_draft_tokens": total.accepted,
    }
    tokens = {"prompt_tokens": prompt, "completion_tokens": total.tokens, "total_tokens": prompt + total.tokens}
    cached = {"cached_tokens": min(total.cached, prompt)}  # of several choices, each may have taken over the same ones
    return tokens | {"prompt_tokens_details": cached, "decoding": decoding}
