"""The request of OpenAI's Responses API, POST /v1/responses, as another form of a chat completion.

The endpoint keeps no answers: `store` is accepted and nothing is stored, and `previous_response_id` is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from serve.protocol.accepting import Accepting, Values
from serve.protocol.errors import ApiError
from serve.protocol.requests import CHANGES_NOTHING, ChatRequest, RequestFields, Text, text_or_list
from serve.protocol.tools import MAX_TOOLS, CalledFunction, Function, NamedFunction, kind_of_choice

CONVERTED = {"max_tokens", "max_completion_tokens", "stream_options", "tools", "tool_choice"}
"""Fields of a chat completion that `ResponsesRequest.as_chat` does not copy."""
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
    if param and param.startswith("tool"):
        param = param.replace(".function", "")  # the fields of a function stand in the tool itself here
    return ApiError(error.status, error.message, param, error.code)


class InputPart(Accepting):
    """A part of an input item: text of the user, or text of an earlier answer."""

    changes_nothing: ClassVar[Values] = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["input_text", "output_text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputPart], Field(fail_fast=True), Tag("<list>")],
    Discriminator(text_or_list),
]


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Item(Accepting):
    """What the items of a conversation have in common."""

    id: str | None = None
    """Accepted and not used."""
    status: str | None = None
    """Accepted and not used."""


class MessageItem(Item):
    """A message, also an answer that is sent back as it came."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Append it as a message of a chat completion; text behind a call belongs to the same answer as the call."""
        if self.role == "assistant" and messages and messages[-1].get("tool_calls"):
            messages[-1]["content"] = (messages[-1]["content"] or "") + _text(self.content)
        else:
            messages.append({"role": self.role, "content": _text(self.content)})


class CallItem(Item, CalledFunction):
    """A call in an earlier answer."""

    changes_nothing: ClassVar[Values] = {"async": (False,)}
    type: Literal["function_call"]
    call_id: str

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Add it to the assistant's message before it, to which it belongs, or to a new one."""
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
        messages[-1].setdefault("tool_calls", []).append(call)


class CallOutputItem(Item):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Append it as a message of a chat completion."""
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)})


def _kind_of_item(value: Any) -> str | None:
    kind = (value.get("type") if isinstance(value, dict) else None) or "message"
    return f"<{kind}>" if kind in ("message", "function_call", "function_call_output") else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="unknown_item",
        custom_error_message="items may have the types message, function_call and function_call_output",
    ),
]


class FlatTool(Function):
    """A function that the model may call."""

    changes_nothing: ClassVar[Values] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }
    type: Literal["function"]

    def nested(self) -> dict[str, Any]:
        """In the shape of chat completions."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class FlatNamedTool(NamedFunction):
    """The tool that the model has to call."""

    type: Literal["function"]


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

    changes_nothing: ClassVar[Values] = CHANGES_NOTHING | {
        "truncation": ("disabled",),
        "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]),
        "store": (True, False),
    }

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
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call."""
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[FlatNamedTool, Tag("<tool>")],
            Discriminator(kind_of_choice),
        ]
        | None
    ) = None
    """As in chat completions."""
    parallel_tool_calls: bool | None = None
    """Several calls in an answer are possible, which is the default."""
    max_tool_calls: int | None = None
    """Accepted and not used, because it counts calls of tools that a server runs itself."""
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
        fields = self.model_dump(include=set(ChatRequest.model_fields) - CONVERTED, exclude_none=True, by_alias=True)
        chat = {"messages": self._messages(), "max_tokens": next(iter(limits), None), **fields}
        chat["tools"] = [tool.nested() for tool in self.tools or ()]
        chat["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, FlatNamedTool):
            chat["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text and (form := self.text.format):
            if self.response_format:
                raise ApiError(
                    400, "text.format and response_format both give a form; send the first", "response_format"
                )
            schema = {"json_schema": {"schema": form.schema_}} if form.schema_ is not None else {}
            chat["response_format"] = {"type": form.type, **schema}
        return ChatRequest.model_validate(chat)

    def _messages(self) -> list[dict[str, Any]]:
        """The instructions and the input as messages of a chat completion."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            item.add_to(messages)
        return messages
