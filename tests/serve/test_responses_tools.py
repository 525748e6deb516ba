"""Tools in OpenAI's Responses API: whole, streamed, and an agent's loop with OpenAI's client."""

import json

import openai
import pytest
from jsonschema import validate

from serve.protocol.responses_answer import ResponsesBuilder
from serve.protocol.responses_request import ResponsesRequest
from serve.tool_calls import CallDelta
from tests.serve.test_tools import CITY, TOOLS, http  # noqa: F401  (a fixture)

pytestmark = pytest.mark.cluster
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
SCHEMAS = {"weather": CITY, "now": {"maxProperties": 0}}


@pytest.fixture
def client(http):  # noqa: F811
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


def asked(**body):
    given = {"model": "tiny", "input": "How warm?", "tools": FLAT, "max_output_tokens": 200} | body
    return given | {"extra_body": {"seed": given.pop("seed", 0)}}


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_items_that_keep_to_their_schemas_and_a_stream_adds_up_to_them(client, seed):
    whole = client.responses.create(**asked(tool_choice="required", parallel_tool_calls=False, seed=seed))
    (call,) = whole.output
    assert (call.type, call.status, whole.status, whole.output_text) == ("function_call", "completed", "completed", "")
    validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert (whole.tool_choice, whole.parallel_tool_calls, whole.tools[0].parameters) == ("required", False, CITY)
    stream = client.responses.create(**asked(tool_choice="required", parallel_tool_calls=False, seed=seed, stream=True))
    events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    assert "".join(event.delta for event in events[3:-3]) == call.arguments == events[-3].arguments
    assert events[2].item.name == events[-3].name == events[-2].item.name == call.name
    assert (events[2].item.arguments, events[-2].item.arguments) == ("", call.arguments)
    assert events[-1].response.output[0].arguments == call.arguments


def test_the_function_that_is_named_is_called_and_none_means_text(client):
    named = client.responses.create(**asked(tool_choice={"type": "function", "name": "now"}))
    (call,) = named.output
    assert (call.name, call.arguments, named.tool_choice.name) == ("now", "{}", "now")
    none = client.responses.create(**asked(tool_choice="none", max_output_tokens=9))
    plain = client.responses.create(**asked(tools=[], max_output_tokens=9))
    assert none.output_text == plain.output_text != ""
    assert none.usage.input_tokens == plain.usage.input_tokens


def test_a_call_that_the_limit_cuts_is_incomplete(client):
    cut = client.responses.create(**asked(tool_choice={"type": "function", "name": "weather"}, max_output_tokens=55))
    (call,) = cut.output
    assert (cut.status, call.status) == ("incomplete", "incomplete")
    assert not call.arguments.endswith("}")


def test_an_agents_loop_has_the_conversation_of_the_same_chat(client):
    items = [{"role": "user", "content": "How warm?"}]
    first = client.responses.create(**asked(input=items, tool_choice="required", parallel_tool_calls=False))
    (call,) = first.output
    items += [item.model_dump() for item in first.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
    last = client.responses.create(**asked(input=items, max_output_tokens=5))
    function = {"name": call.name, "arguments": call.arguments}
    messages = [
        items[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "21 degrees"},
    ]
    chat = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=5, seed=0)
    assert last.output_text == chat.choices[0].message.content != ""
    assert last.usage.input_tokens == chat.usage.prompt_tokens


def test_calls_and_the_texts_around_them_are_one_message_and_an_output_may_come_in_parts():
    call = {"type": "function_call", "call_id": "1", "name": "a", "arguments": ""}
    body = ResponsesRequest.model_validate(
        {
            "input": [
                {"role": "user", "content": "b"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
                call | {"id": "fc_1", "status": "completed", "caller": None},
                call | {"call_id": "2"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "e"}]},
                {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "d"}]},
            ]
        }
    )
    user, assistant, tool = body.as_chat().messages
    assert (user.text, assistant.text, tool.text, tool.tool_call_id) == ("b", "ce", "d", "1")
    assert [each.id for each in assistant.tool_calls] == ["1", "2"]


def test_items_come_in_the_order_of_the_text_and_each_ends_before_the_next_begins():
    builder = ResponsesBuilder("tiny", ResponsesRequest(input="a"))
    parts = ["b", "c", CallDelta(0, "call_1", "f", ""), CallDelta(0, None, None, "{}"), "d"]
    sent = b"".join(map(builder.grow, parts))
    kinds = [
        json.loads(line.removeprefix("data: "))["type"]
        for line in sent.decode().splitlines()
        if line.startswith("data")
    ]
    assert [kind.removeprefix("response.") for kind in kinds if "delta" not in kind] == [
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
    ]
    shown = [(item["type"], item["status"]) for item in builder.items]
    assert shown == [("message", "completed"), ("function_call", "completed"), ("message", "in_progress")]
    assert [item["content"][0]["text"] for item in builder.items[::2]] == ["bc", "d"]
