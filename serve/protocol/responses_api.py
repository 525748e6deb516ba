"""OpenAI's Responses API, POST /v1/responses, as another form of a chat completion: its request, its answer and its events.

The endpoint keeps no answers: `store` is accepted and nothing is stored, and `previous_response_id` is refused.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator

from serve.protocol.accepting import Accepting, Values
from serve.protocol.errors import ApiError
from serve.protocol.requests import CHANGES_NOTHING, NO_TOOLS, ChatRequest, RequestFields, Text, text_or_list

NOT_PASSED_ON = {"max_tokens", "max_completion_tokens", "stream_options"}
FIELDS_OF_CHAT = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Field of a chat completion → its name in this API."""


def named_here(error: ApiError) -> ApiError:
    """The error of a chat completion, with the field names of this API."""
    param = error.param and FIELDS_OF_CHAT.get(re.split(r"[.\[]", error.param)[0], error.param)
    return ApiError(error.status, error.message, param, error.code)


class InputPart(Accepting):
    """A part of an input item: text of the user, or text of an earlier answer."""

    changes_nothing: ClassVar[Values] = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["input_text", "output_text"]
    text: str


class InputItem(Accepting):
    """A message of the conversation, also an answer that is sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[InputPart], Field(fail_fast=True), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    id: str | None = None
    """Accepted and not used."""
    status: str | None = None
    """Accepted and not used."""

    @property
    def message(self) -> dict[str, Any]:
        """The same as a message of a chat completion."""
        whole = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": whole}


class TextFormat(Accepting):
    """The same as `response_format` of chat completions, with the schema's fields beside `type`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    """Accepted and not used."""
    description: str | None = None
    """Accepted and not used."""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted and not used: the schema always holds."""


class TextOptions(Accepting):
    """The form of an answer."""

    changes_nothing: ClassVar[Values] = {"verbosity": ("medium",)}
    format: TextFormat | None = None


class ReasoningOptions(Accepting):
    """How much to reason: not at all."""

    changes_nothing: ClassVar[Values] = {"effort": ("none",)}


class ResponsesRequest(RequestFields):
    """The body of POST /v1/responses, with the same extra fields as chat completions."""

    changes_nothing: ClassVar[Values] = (
        CHANGES_NOTHING
        | NO_TOOLS
        | {
            "truncation": ("disabled",),
            "background": (False,),
            "include": ([], ["reasoning.encrypted_content"]),
            "store": (True, False),
        }
    )

    input: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=4095, fail_fast=True), Tag("<list>")],
        Discriminator(text_or_list),
    ]
    """The user's text, or the messages of a conversation."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: int | None = Field(None, ge=1)
    """The most tokens to generate."""
    text: TextOptions | None = None
    """The answer is a JSON object, or a JSON document of a schema."""
    reasoning: ReasoningOptions | None = None
    """Accepted where it changes nothing."""
    max_tool_calls: int | None = None
    """Accepted and not used, because there are no tools."""
    prompt_cache_retention: str | None = None
    """Accepted and not used."""

    @field_validator("n")
    @classmethod
    def _one_choice(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            raise ApiError(400, f"n={n}: a response has one choice; send several requests", "n")
        return n

    @property
    def logprob_counts(self) -> tuple[int | None, int | None]:
        """Responses have no log-probabilities here."""
        return None, None

    def as_chat(self) -> ChatRequest:
        """The chat completion that answers this request. Raises ApiError for two limits that differ."""
        limits = {self.max_output_tokens, self.token_limit} - {None}
        if len(limits) > 1:
            raise ApiError(400, "max_output_tokens and max_tokens differ; send the first alone", "max_output_tokens")
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else []
        items += [] if isinstance(self.input, str) else [item.message for item in self.input]
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields = self.model_dump(
            include=set(ChatRequest.model_fields) - NOT_PASSED_ON, exclude_none=True, by_alias=True
        )
        chat = {"messages": [*system, *items], "max_tokens": next(iter(limits), None), **fields}
        if self.text and (form := self.text.format):
            if self.response_format:
                raise ApiError(
                    400, "text.format and response_format both give a form; send the first", "response_format"
                )
            schema = {"json_schema": {"schema": form.schema_}} if form.schema_ is not None else {}
            chat["response_format"] = {"type": form.type, **schema}
        return ChatRequest.model_validate(chat)


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputMessage(BaseModel):
    """The message that the model wrote."""

    type: Literal["message"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ResponsesAnswer(BaseModel):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    tool_choice: Literal["auto"]
    tools: list[Any]
    metadata: dict[str, Any] | None
    usage: dict[str, Any] | None


class ResponsesBuilder:
    """Builds the answer to one request, whole or as events.

    Args:
        model: its name.
        request: whose instructions and metadata are repeated.
    """

    def __init__(self, model: str, request: ResponsesRequest):
        self.model, self.instructions, self.metadata = model, request.instructions, request.metadata
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created, self.number = int(time.time()), 0

    def answer(
        self,
        status: str,
        text: str | None,
        usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response as it stands; a text that is None has not begun."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.instructions,
            "model": self.model,
            "output": [] if text is None else [self._message("incomplete" if error else status, text)],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "metadata": self.metadata,
            "usage": usage and _usage(usage),
        }

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"type": "message", "id": self.item, "status": status, "role": "assistant", "content": content}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    def event(self, kind: str, **fields: Any) -> bytes:
        """One server-sent event, numbered."""
        body = {"type": f"response.{kind}", "sequence_number": self.number, **fields}
        self.number += 1
        return f"event: response.{kind}\ndata: ".encode() + json.dumps(body).encode("ascii") + b"\n\n"

    def _on_item(self, kind: str, **fields: Any) -> bytes:
        return self.event(kind, item_id=self.item, output_index=0, content_index=0, **fields)

    def opening(self) -> bytes:
        """The events before the first text."""
        begun = self.answer("in_progress", None)
        return (
            self.event("created", response=begun)
            + self.event("in_progress", response=begun)
            + self.event("output_item.added", output_index=0, item=self._message("in_progress", None))
            + self._on_item("content_part.added", part=self._part(""))
        )

    def delta(self, text: str) -> bytes:
        """New text."""
        return self._on_item("output_text.delta", delta=text, logprobs=[])

    def closing(self, finish: str | None, text: str, usage: dict[str, Any]) -> bytes:
        """The events after the last text."""
        status = status_of(finish)
        return (
            self._on_item("output_text.done", text=text, logprobs=[])
            + self._on_item("content_part.done", part=self._part(text))
            + self.event("output_item.done", output_index=0, item=self._message(status, text))
            + self.event(status, response=self.answer(status, text, usage))
        )

    def failed(self, error: ApiError, text: str) -> bytes:
        """The last event of a stream whose engine has died."""
        why = {"code": "server_error", "message": error.message}
        return self.event("failed", response=self.answer("failed", text, error=why))


def status_of(finish: str | None) -> str:
    """`incomplete` for an answer that the token limit has cut."""
    return "incomplete" if finish == "length" else "completed"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "decoding": usage["decoding"],
    }
