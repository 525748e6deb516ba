"""The fields of a request, and the decision to accept or to refuse each of them.

A field that would change the answer is honoured or refused by its path with status 400. A field or a value that changes
nothing is accepted, so that ordinary clients need not know which those are: null, and what `CHANGES_NOTHING` lists. Unknown
fields are refused. Limits that depend on the model (context length, k, sampling) are checked later, by `read_choices` and
`Engine.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kforcing.engine.request import MAX_LOGPROBS
from serve.protocol.accepting import Accepting, Values
from serve.protocol.errors import ApiError
from serve.protocol.structured import FormFields
from serve.protocol.tools import ToolCall, ToolFields

CHANGES_NOTHING: Values = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_token_ids": (False,),
    "chat_template_kwargs": ({},),
    "extra_body": ({},),
    "documents": ([],),
    "priority": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
"""Fields of OpenAI's API and of other servers that this endpoint does not have, with the values at which they change nothing.
Any other value is refused."""

NO_TOOLS: Values = {"tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False)}
"""The same where there are no tools."""

MAX_CHOICES = 128
"""The most choices (prompts × n) of a request."""
MAX_STOPS = 64
"""The most stop strings, and the most stop token ids, of a request."""


# What tells the members of a union apart, so that an error comes from the one that the client meant. Their tags are in angle
# brackets, which no path of a field contains.


def text_or_list(value: Any) -> str:
    """The tag of a value that is text or a list."""
    return "<list>" if isinstance(value, list) else "<text>"


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str | list):
        return "<texts>" if isinstance(first, str) else "<lists>"
    return text_or_list(value)


Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Ids, Tag("<list>")]
    | Annotated[list[Text], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("<texts>")]
    | Annotated[list[Ids], Field(max_length=MAX_CHOICES, fail_fast=True), Tag("<lists>")],
    Discriminator(_kind_of_prompt),
]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    Discriminator(text_or_list),
]


class StreamOptions(Accepting):
    """Which usage statistics a stream contains."""

    changes_nothing: ClassVar[Values] = {"include_obfuscation": (True, False)}  # no chunk is obfuscated
    include_usage: bool | None = None
    """Send a last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far in every chunk."""


class RequestFields(FormFields):
    """The fields that completions and chat completions share."""

    changes_nothing: ClassVar[Values] = CHANGES_NOTHING

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
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_p: float | None = Field(None, ge=0, le=1)
    """Leave out tokens that are less likely than this share of the likeliest one."""
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Bias] | None = None
    """Added to the logits of token ids."""
    min_tokens: int | None = Field(None, ge=0)
    """No EOS, stop token or stop string ends the answer before so many tokens."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Makes the answer repeatable. With `n`, each choice after the first has its own seed, derived from this one."""
    k: int | None = Field(None, ge=1)
    """The most tokens per forward pass, at most the k of the deployment."""
    acceptance: Literal["exact", "fixed"] | None = None
    """`exact`: the text is the AR model's own, at 1 to k tokens per forward pass. `fixed`: always k tokens, none of them
    verified. The deployment has a default."""
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    """The text ends behind the stop string, and not before it."""
    skip_special_tokens: bool | None = None
    """Special tokens have no text, which is the default."""
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    """Keep so many of a prompt's last tokens."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted and not used."""
    safety_identifier: str | None = None
    """Accepted and not used."""
    prompt_cache_key: str | None = None
    """Accepted and not used."""
    metadata: dict[str, Any] | None = None
    """Accepted and not used."""

    @model_validator(mode="after")
    def _check_together(self) -> RequestFields:
        if self.token_limit is not None and (self.min_tokens or 0) > self.token_limit:
            message = f"min_tokens={self.min_tokens} is more than max_tokens={self.token_limit}"
            raise ApiError(400, message, "min_tokens")
        if None not in (given := (self.max_tokens, self.max_completion_tokens)) and given[0] != given[1]:
            message = (
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ; send one "
                "of them"
            )
            raise ApiError(400, message, "max_completion_tokens")
        if self.stream_options is not None and self.stream_options.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options need stream=true", "stream_options")
        return self

    @property
    def logprob_counts(self) -> tuple[int | None, int | None]:
        """See the subclasses."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stop_strings(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(RequestFields):
    """The body of POST /v1/completions."""

    changes_nothing: ClassVar[Values] = CHANGES_NOTHING | NO_TOOLS

    prompt: Prompt
    """Text, token ids, or a list of either."""
    max_tokens: int | None = Field(None, ge=0)
    """The most tokens to generate; 0, with `echo`, for none."""
    echo: bool | None = None
    """Return the prompt before the completion."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Return the log-probability of each token and of so many likeliest tokens; with `echo` also those of the prompt."""
    best_of: int | None = None
    """Refused unless it equals `n`."""

    @property
    def logprob_counts(self) -> tuple[int | None, int | None]:
        """How many likeliest tokens are wanted at each token of the answer and of the prompt; None for none of both."""
        return self.logprobs, self.logprobs if self.echo else None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens=0 needs echo=true; ask for at least 1", "max_tokens")
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = f"best_of={self.best_of} is not supported unless it equals n; leave it out"
            raise ApiError(400, message, "best_of")
        return self


class TextPart(Accepting):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Accepting):
    """One message of a conversation."""

    # What answers of this and other servers carry beside the text, so that they can be sent back as they are.
    changes_nothing: ClassVar[Values] = {
        "annotations": ([],),
        "reasoning_content": ("",),
        "refusal": ("",),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<list>")],
        Discriminator(text_or_list),
    ] = Field(None, validate_default=True)
    """Text; the assistant's messages may have none."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """What the assistant called."""
    tool_call_id: str | None = None
    """The call that a message of the role `tool` answers."""

    @field_validator("content", mode="before")
    @classmethod
    def _needs_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("only messages of the assistant may have no content")
        return "" if content is None else content

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(RequestFields, ToolFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Return those of so many likeliest tokens, too."""

    @property
    def logprob_counts(self) -> tuple[int | None, int | None]:
        """How many likeliest tokens are wanted at each token of the answer; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None, None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, f"top_logprobs={self.top_logprobs} needs logprobs=true", "top_logprobs")
        self.check_tools()
        for i, message in enumerate(self.messages):
            if message.tool_calls and message.role != "assistant":
                raise ApiError(400, "only the assistant calls tools", f"messages[{i}].tool_calls")
        return self


class TokenizeRequest(ToolFields):
    """The body of POST /tokenize: a prompt, or a conversation with the tools that a chat completion would have."""

    changes_nothing: ClassVar[Values] = {"add_generation_prompt": (True,)}
    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    """Of a prompt: with what the tokenizer puts before a text, which is the default. Chat templates write their own."""

    @model_validator(mode="after")
    def _check_one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if self.tools and self.prompt is not None:
            raise ApiError(400, "only conversations have tools; give messages", "tools")
        self.check_tools()
        return self


class DetokenizeRequest(Accepting):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
