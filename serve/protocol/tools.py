"""Tools as clients send them with a chat: function definitions, the choice of one, and calls in earlier messages."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator

from serve.protocol.accepting import Accepting, Values
from serve.protocol.errors import ApiError

MAX_TOOLS = 128
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Accepting):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; none for a function without parameters."""
    strict: bool | None = None
    """With `tool_choice` auto, calls keep to their schemas if any tool is strict. With another choice they always do."""

    @field_validator("parameters")
    @classmethod
    def _is_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and schema.get("type", "object") != "object":
            raise ValueError(f"type={schema['type']!r}: the parameters of a function are a schema of an object")
        return schema

    @property
    def arguments(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object"} | self.parameters


class Tool(Accepting):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Accepting):
    """The name of a function."""

    name: FunctionName


class NamedTool(Accepting):
    """The tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Accepting):
    """What an earlier answer called."""

    name: FunctionName
    arguments: str
    """JSON."""

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, text: str) -> str:
        try:
            json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"arguments are not JSON: {error}") from None
        return text or "{}"


class ToolCall(Accepting):
    """A call in an earlier answer."""

    changes_nothing: ClassVar[Values] = {"index": tuple(range(MAX_TOOLS))}
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """In the form that chat templates expect, where arguments are no text."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def kind_of_choice(value: Any) -> str:
    """The tag of a `tool_choice` that is a word or a tool."""
    return "<text>" if isinstance(value, str) else "<tool>"


class ToolFields(Accepting):
    """The fields of a chat that are about tools."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call."""
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<tool>")],
            Discriminator(kind_of_choice),
        ]
        | None
    ) = None
    """`auto`: text, calls or both. `required`: at least one call. A tool: a call of it. `none`: text alone."""
    parallel_tool_calls: bool | None = None
    """Several calls in an answer are possible, which is the default."""

    @property
    def functions(self) -> list[Function]:
        """The functions that may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.function for tool in self.tools or ()]

    @property
    def named(self) -> str | None:
        """The function that has to be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether the answer consists of calls."""
        return self.tool_choice == "required" or self.named is not None

    def check_tools(self) -> None:
        """Raise ApiError for a choice among tools that there are not, and for two tools of one name."""
        names = [function.name for function in self.functions]
        if self.must_call and not names:
            raise ApiError(400, "tool_choice asks for a call, and there are no tools", "tool_choice")
        if self.named is not None and self.named not in names:
            message = f"tool_choice names {self.named!r}, and the tools are {', '.join(names)}"
            raise ApiError(400, message, "tool_choice.function.name")
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ApiError(400, f"two tools have the name {twice!r}", f"tools[{names.index(twice)}].function.name")
