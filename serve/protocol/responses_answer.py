"""The answer of OpenAI's Responses API, POST /v1/responses, and its events."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from serve.protocol.errors import ApiError
from serve.protocol.responses_request import ResponsesRequest
from serve.tool_calls import CallDelta, Delta

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class OutputMessage(BaseModel):
    """The message that the model wrote."""

    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that the model asks for."""

    type: Literal["function_call"]
    id: str
    call_id: str
    """What a `function_call_output` has to name."""
    status: Status
    name: str
    arguments: str
    """JSON; cut where the status is `incomplete`."""


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
    output: list[Annotated[OutputMessage | OutputCall, Field(discriminator="type")]]
    parallel_tool_calls: bool
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    tools: list[dict[str, Any]]
    metadata: dict[str, Any] | None
    usage: dict[str, Any] | None


class ResponsesBuilder:
    """Builds the answer to one request as it comes: each method returns the events that a stream sends.

    The output is a list of items, messages and calls, in the order of the text. An item ends where the next one begins.

    Args:
        model: its name.
        request: whose instructions, tools and metadata are repeated.
    """

    def __init__(self, model: str, request: ResponsesRequest):
        settings = request.model_dump(include={"tool_choice", "parallel_tool_calls", "tools"}, exclude_none=True)
        self.constant = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "instructions": request.instructions,
            "model": model,
            "metadata": request.metadata,
            **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], **settings},
        }
        self.items: list[dict[str, Any]] = []
        """The output so far; only the last item may be in progress."""
        self.number = 0

    def answer(
        self, status: str, usage: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The response as it stands."""
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        growing = {"status": status, "error": error, "incomplete_details": cut, "output": self.items}
        return self.constant | growing | {"usage": usage and _usage(usage)}

    def opening(self) -> bytes:
        """The events before the first item."""
        begun = self.answer("in_progress")
        return self._event("created", response=begun) + self._event("in_progress", response=begun)

    def grow(self, part: Delta) -> bytes:
        """New text, or more of a call."""
        if isinstance(part, CallDelta):
            return self._grow_call(part)
        events = b"" if self._is_open("message") else self._begin(_message())
        self.items[-1]["content"][0]["text"] += part
        return events + self._on_item("output_text.delta", content_index=0, delta=part, logprobs=[])

    def closing(self, finish: str | None, usage: dict[str, Any]) -> bytes:
        """The events after the last text."""
        status = status_of(finish)
        events = b"" if self.items else self._begin(_message())
        return events + self._end(status) + self._event(status, response=self.answer(status, usage))

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream whose engine has died."""
        if self.items:
            self.items[-1]["status"] = "incomplete"
        why = {"code": "server_error", "message": error.message}
        return self._event("failed", response=self.answer("failed", error=why))

    def _grow_call(self, part: CallDelta) -> bytes:
        events = b""
        if part.name is not None:
            own = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id}
            events = self._begin({**own, "status": "in_progress", "name": part.name, "arguments": ""})
        self.items[-1]["arguments"] += part.arguments
        return events + self._on_item("function_call_arguments.delta", delta=part.arguments)

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and (self.items[-1]["type"], self.items[-1]["status"]) == (kind, "in_progress")

    def _begin(self, item: dict[str, Any]) -> bytes:
        """End the item before, and begin this one."""
        events = self._end("completed")
        self.items.append(item)
        if item["type"] == "function_call":
            return events + self._event("output_item.added", output_index=len(self.items) - 1, item=item)
        empty = item | {"content": []}
        events += self._event("output_item.added", output_index=len(self.items) - 1, item=empty)
        return events + self._on_item("content_part.added", content_index=0, part=item["content"][0])

    def _end(self, status: str) -> bytes:
        """End the last item, if there is one."""
        if not self.items:
            return b""
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = self._on_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            (part,) = item["content"]
            done = self._on_item("output_text.done", content_index=0, text=part["text"], logprobs=[])
            done += self._on_item("content_part.done", content_index=0, part=part)
        return done + self._event("output_item.done", output_index=len(self.items) - 1, item=item)

    def _on_item(self, kind: str, **fields: Any) -> bytes:
        """An event of the last item."""
        return self._event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One server-sent event, numbered."""
        body = {"type": f"response.{kind}", "sequence_number": self.number, **fields}
        self.number += 1
        return f"event: response.{kind}\ndata: ".encode() + json.dumps(body).encode("ascii") + b"\n\n"


def status_of(finish: str | None) -> str:
    """`incomplete` for an answer that the token limit has cut."""
    return "incomplete" if finish == "length" else "completed"


def _message() -> dict[str, Any]:
    """A message whose text has not begun."""
    content = [{"type": "output_text", "text": "", "annotations": []}]
    own = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
    return {**own, "status": "in_progress", "content": content}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "decoding": usage["decoding"],
    }
