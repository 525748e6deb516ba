"""What clients may send and what they get: OpenAI's shapes, every field honoured or refused by name."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MAX_CHOICES = 128


class ApiError(Exception):
    """An answer with an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> Response:
        """As HTTP."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return AsciiJSON({"error": error}, self.status, headers)


class AsciiJSON(Response):
    """JSON that any byte of a client's text can be echoed in, lone surrogates included."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(content).encode("ascii")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


class StreamOptions(BaseModel):
    """What a stream says of its usage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""


class Common(BaseModel):
    """Fields of both kinds of request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    """One of `/v1/models`; the first of them when left out."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens to make at most."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same under its newer name."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """Draw from this many likeliest tokens; 0 or −1 for all."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Makes the answer repeatable. Choice i > 0 of `n` has a seed of its own that follows from it."""
    k: int | None = Field(None, ge=1)
    """Tokens of a forward pass, at most what the deployment was started with."""
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Not used."""
    metadata: dict[str, Any] | None = None
    """Not used."""
    logprobs: int | bool | None = None
    """Refused unless empty: the answer carries no log-probabilities."""
    top_logprobs: int | None = None
    """Refused likewise."""
    logit_bias: dict[str, float] | None = None
    """Refused unless empty."""
    min_tokens: int | None = None
    """Refused unless 0."""

    @model_validator(mode="before")
    @classmethod
    def _few(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > 2 * len(cls.model_fields):
            raise ValueError(f"{len(given)} fields; a request has at most {len(cls.model_fields)}")
        return given

    @model_validator(mode="after")
    def _refuse(self) -> Common:
        for name in ("logprobs", "top_logprobs", "logit_bias", "min_tokens"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; leave it out")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream=true")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens to make at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    """Text, token ids, or a list of either."""
    echo: bool | None = None
    """Refused if true."""
    best_of: int | None = None
    """Refused unless equal to `n`."""
    suffix: str | None = None
    """Refused unless empty."""

    @model_validator(mode="after")
    def _refuse_more(self) -> CompletionRequest:
        if self.echo or self.suffix:
            raise ValueError(f"{'echo' if self.echo else 'suffix'} is not supported; leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is not supported unless it equals n; leave it out")
        return self


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    """The stop string or token id that ended it, None for end-of-text or the limit."""


class CompletionResponse(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
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


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Shape:
    """Answers of one request, whole or in chunks, for completions or chat."""

    def __init__(self, chat: bool, model: str):
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _frame(self, object: str, choices: list[Any], usage: Any) -> dict[str, Any]:
        own = {"id": self.id, "object": object, "created": self.created, "model": self.model}
        return own | {"choices": choices} | ({"usage": usage} if usage is not None else {})

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed; choices have index, text and reasons."""
        if not self.chat:
            return self._frame("text_completion", [{"logprobs": None, **choice} for choice in choices], usage)
        chats = [
            {"message": {"role": "assistant", "content": choice.pop("text")}, "logprobs": None, **choice}
            for choice in choices
        ]
        return self._frame("chat.completion", chats, usage)

    def opening(self, index: int) -> bytes | None:
        """The chunk before the first text of a choice."""
        return self.chunk(index, None, None, None, None) if self.chat else None

    def chunk(
        self, index: int, text: str | None, finish: str | None, stop: str | int | None, usage: dict[str, int] | None
    ) -> bytes:
        """One server-sent event."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish, "stop_reason": stop}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": ""} if text is None else {"content": text}
        else:
            choice["text"] = text or ""
        return event(self._frame("chat.completion.chunk" if self.chat else "text_completion", [choice], usage))

    def closing(self, usage: dict[str, int]) -> bytes:
        """The chunk with the whole usage."""
        return event(self._frame("chat.completion.chunk" if self.chat else "text_completion", [], usage))


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The usage record."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
