"""The fields of a request, and the decision to accept or to refuse each of them.

A field is honoured, refused by name with status 400, or documented as unused; none is ignored silently. Unknown fields are
refused. Limits that depend on the model (context length, k, sampling) are checked later, by `Engine.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MAX_CHOICES = 128
"""The most choices (prompts × n) of a request."""


class StreamOptions(BaseModel):
    """Which usage statistics a stream contains."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    """Send a last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far in every chunk."""


class RequestFields(BaseModel):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    """A name from `/v1/models`; the first of them when this is left out."""
    max_tokens: int | None = Field(None, ge=1)
    """The most tokens to generate."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of `max_tokens`."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """Draw from this many of the likeliest tokens; 0 or −1 means all."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Makes the answer repeatable. With `n`, each choice after the first has its own seed, derived from this one."""
    k: int | None = Field(None, ge=1)
    """The most tokens per forward pass, at most the k of the deployment."""
    acceptance: Literal["exact", "fixed"] | None = None
    """`exact`: the text is the AR model's own, at 1 to k tokens per forward pass. `fixed`: always k tokens, none of them
    verified. The deployment has a default."""
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used."""
    metadata: dict[str, Any] | None = None
    """Accepted and not used."""
    logprobs: int | bool | None = None
    """Refused unless it is empty: no model supports log-probabilities."""
    top_logprobs: int | None = None
    """Refused unless it is empty, like `logprobs`."""
    logit_bias: dict[str, float] | None = None
    """Refused unless it is empty."""
    min_tokens: int | None = None
    """Refused unless it is 0."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_too_many_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > 2 * len(cls.model_fields):
            raise ValueError(f"the request has {len(given)} fields; at most {len(cls.model_fields)} are possible")
        return given

    @model_validator(mode="after")
    def _refuse_unsupported_fields(self) -> RequestFields:
        for name in ("logprobs", "top_logprobs", "logit_bias", "min_tokens"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; leave it out")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream=true")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_strings(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(RequestFields):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    """Text, token ids, or a list of either."""
    echo: bool | None = None
    """Refused if it is true."""
    best_of: int | None = None
    """Refused unless it equals `n`."""
    suffix: str | None = None
    """Refused unless it is empty."""

    @model_validator(mode="after")
    def _refuse_unsupported_completion_fields(self) -> CompletionRequest:
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
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message in the form that chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(RequestFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
