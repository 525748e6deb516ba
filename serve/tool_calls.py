"""Calls of tools in the text of a model: how they look, the grammar that makes them, and the parser that finds them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kforcing.structured import JSON_STYLE
from serve.protocol.tools import Function, ToolCall


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes a call: `begin {"name": NAME, ARGUMENTS: {…}} end`."""

    begin: str
    """Empty where a call is the whole answer."""
    end: str
    arguments: str
    between: str
    """What stands between two calls."""


HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments", "\n")
"""Hermes', which Qwen, SmolLM and most others use."""
LLAMA = ToolFormat("", "", "parameters", "; ")
"""Llama 3's: the whole answer is one call. Its template takes no message with several."""


def tool_format(template: str) -> ToolFormat:
    """The format that a chat template teaches: Llama 3's where it speaks of `parameters` and of no tag, else Hermes'."""
    return LLAMA if "<tool_call>" not in template and '"parameters"' in template else HERMES


def knows_tools(template: str) -> bool:
    """Whether a chat template has a place for tools."""
    return "tools" in template


def tools_prompt(definitions: Sequence[dict[str, Any]]) -> str:
    """What a system message says about tools where the chat template says nothing."""
    shown = "\n".join(json.dumps(definition, ensure_ascii=False) for definition in definitions)
    call = '{"name": <name of the function>, "arguments": <object with its arguments>}'
    return (
        f"You can call functions. These are their definitions:\n<tools>\n{shown}\n</tools>\n"
        f"To call a function, answer with:\n{HERMES.begin}{call}{HERMES.end}"
    )


def definition(function: Function) -> dict[str, Any]:
    """A function as chat templates expect it."""
    fields = {"name": function.name, "description": function.description or "", "parameters": function.arguments}
    return {"type": "function", "function": fields}


def call_text(call: ToolCall) -> str:
    """A call of an earlier answer, as Hermes writes it."""
    body = f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments}}}'
    return HERMES.begin + body + HERMES.end


def tools_grammar(functions: Sequence[Function], form: ToolFormat, must_call: bool, parallel: bool) -> str:
    """A Lark grammar of answers with calls that keep to the schemas; unless there must be one, also of any other text."""
    rules = []
    for i, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{form.arguments}": ')
        schema = json.dumps(function.arguments | {"x-guidance": JSON_STYLE})
        rules.append(f'call_{i}: {head} %json {schema} "}}"')
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    end = json.dumps(form.end) if form.end else ""
    again = f"({json.dumps(form.between)} call)*" if parallel else ""
    if must_call:
        begin = json.dumps(form.begin) if form.begin else ""
        return "\n".join([f"start: call {again}", f"call: {begin} ({calls}) {end}", *rules])
    if not form.begin:
        rest = r"rest: /[\s;]*([^{\s;](.|\n)*)?/"
        return "\n".join(["start: call | rest", f"call: {calls}", rest, *rules])
    tag = form.begin.strip()
    rest = json.dumps(form.begin[len(tag) :])
    text = r"TEXT: /(.|\n)*/"
    tagged = [f"call: tag {rest} ({calls}) {end}", f"tag[lazy]: TEXT {json.dumps(tag)}"]
    return "\n".join(["start: call* rest" if parallel else "start: call | rest", "rest: TEXT", text, *tagged, *rules])


@dataclass(frozen=True)
class ToolUse:
    """How the answers of a request may call tools."""

    form: ToolFormat
    names: frozenset[str]
    """The names of the functions."""
    named: bool
    """Whether the request names the function to call; then `finish_reason` stays `stop`."""
    parallel: bool
    """Whether an answer may have several calls."""

    def stream(self) -> ToolStream:
        """What finds the calls in a new answer."""
        return ToolStream(self.form, self.names, None if self.parallel else 1)


class CallDelta(NamedTuple):
    """What a piece of text adds to a call."""

    number: int
    """The call's number, from 0."""
    id: str | None
    """The first piece has it."""
    name: str | None
    """The first piece has it."""
    arguments: str
    """More of their JSON."""

    def as_delta(self) -> dict[str, Any]:
        """The piece in the form of OpenAI's chunks."""
        begun = {"id": self.id, "type": "function"} if self.id else {}
        named = {"name": self.name} if self.name else {}
        return {"index": self.number, **begun, "function": {**named, "arguments": self.arguments}}


def add_to(calls: list[dict[str, Any]], delta: CallDelta) -> None:
    """Add a piece to the calls of a whole answer, in OpenAI's form."""
    if delta.name is not None:
        calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
    calls[delta.number]["function"]["arguments"] += delta.arguments


Delta = str | CallDelta
"""Text of the message, or of a call."""


class ToolStream:
    """Finds calls in a text that comes in pieces.

    Text is passed on as it comes, except for what may turn out to be the beginning of a call and for blanks, which are left
    out beside calls. Arguments are passed on as they come where the name comes first, and when they are complete otherwise.
    A call of a function that is not among the tools is passed on as text.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int | None = None):
        self.most = most
        """The most calls of an answer, None for any number. What follows them is text."""
        self.names, self.tag, self.end = names, form.begin.strip(), form.end.strip()
        self.calls = 0
        """Calls that were found."""
        self._left = ""
        """Text that was not looked at yet."""
        self._blanks = ""
        """Blanks and what else is left out beside a call, since the last text that was passed on."""
        self._call: _Object | None = None
        """The JSON object of a call, as far as it has come."""
        self._plain = False
        """Without tags: the answer has begun as text, so it is no call."""

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """What the next piece of the text adds; `last` says that no further one will come."""
        self._left += text
        deltas: list[Delta] = []
        for delta in self._read(last):
            if isinstance(delta, str) and deltas and isinstance(deltas[-1], str):
                deltas[-1] += delta
            elif delta:
                deltas.append(delta)
        return deltas

    def _read(self, last: bool) -> Iterator[Delta]:
        while self._left:
            before = len(self._left), self._call
            yield from self._object() if self._call else self._text(last)
            if (len(self._left), self._call) == before:
                break
        if last:
            if self._call and not self._call.named:
                yield self._blanks + self._call.text
            elif not self.calls:
                yield self._blanks

    def _text(self, last: bool) -> Iterator[Delta]:
        """Text up to the object of the next call, or to what may be the beginning of one."""
        begin = re.search(re.escape(self.tag) + r"\s*(?=\{)" if self.tag else r"\A[\s;]*(?=\{)", self._left)
        if begin and not self._plain and self.calls != self.most:
            yield from self._passed(self._left[: begin.start()])
            self._blanks += begin[0]
            self._left, self._call = self._left[begin.end() :], _Object()
            return
        kept = "" if last or self._plain else self._beginning()
        text = self._left[: len(self._left) - len(kept)]
        self._left = kept
        self._plain = not self.tag and bool(text)
        yield from self._passed(text)

    def _beginning(self) -> str:
        """The end of the text that may be the beginning of a call."""
        if not self.tag:
            return self._left if re.fullmatch(r"[\s;]*", self._left) else ""
        if whole := re.search(re.escape(self.tag) + r"\s*\Z", self._left):
            return whole[0]
        tags = (self.tag, self.end) if self.calls else (self.tag,)
        beginnings = (tag[:n] for tag in tags for n in range(1, len(tag)))
        return max((each for each in beginnings if self._left.endswith(each)), key=len, default="")

    def _passed(self, text: str) -> Iterator[Delta]:
        """Text without the blanks at its end, which are kept until more text comes, and without tags behind calls."""
        if self.calls and self.end:
            text = text.replace(self.end, "")
        body = text.rstrip()
        if body:
            yield self._blanks + body
            self._blanks = ""
        self._blanks += text[len(body) :]

    def _object(self) -> Iterator[Delta]:
        """More of a call's object."""
        call = self._call
        assert call is not None
        n = call.read(self._left)
        self._left = self._left[n:]
        head = None if call.named else HEAD.match(call.text)
        if head and head[1] in self.names:
            call.named, call.sent = True, head.end()
            yield self._begun(head[1], "")
        if call.named and (more := call.text[call.sent : call.inner_end or len(call.text)]):
            call.sent += len(more)
            yield CallDelta(self.calls - 1, None, None, more)
        if call.inner_end and not call.complete and self.end:  # small models forget the last brace
            at = call.text.find(self.end, call.inner_end)
            if at >= 0:
                call.complete, self._left = True, call.text[at:] + self._left
        if not call.complete:
            return
        self._call = None
        if call.named:
            return
        parsed = _parsed(call.text)
        if parsed and parsed[0] in self.names:
            yield self._begun(*parsed)
        else:
            self._plain = not self.tag
            yield from self._passed(call.text)

    def _begun(self, name: str, arguments: str) -> CallDelta:
        self._blanks = ""
        self.calls += 1
        return CallDelta(self.calls - 1, f"call_{uuid.uuid4().hex[:24]}", name, arguments)


HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""The beginning of a call whose arguments come last, up to them."""


class _Object:
    """A JSON object that comes in pieces, from its brace on."""

    def __init__(self) -> None:
        self.text = ""
        self.named = False
        """Whether the call was announced."""
        self.sent = 0
        """The characters that need not be passed on any more."""
        self.inner_end = 0
        """Where the first object or list inside of it ends; 0 as long as it does not."""
        self.complete = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def read(self, text: str) -> int:
        """Take over the characters that belong to the object; returns their number."""
        n = 0
        for character in text:
            n += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1 and not self.inner_end:
                    self.inner_end = len(self.text) + n
                self.complete = self._depth == 0
                if self.complete:
                    break
        self.text += text[:n]
        return n


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose fields come in another order; None for what is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)
