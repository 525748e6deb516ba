"""Tools through HTTP: an agent's loop with OpenAI's client, streamed or not, and what is refused."""

import json

import openai
import pytest
from jsonschema import validate

from serve.engine_requests import _rendered
from serve.protocol.requests import ChatRequest, Message
from serve.tool_calls import definition
from tests.kforcing.test_structured import TOKENIZER
from tests.serve.test_structured_outputs import TEMPLATE, served

pytestmark = pytest.mark.cluster
KNOWING = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.role }} {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %} {% endfor %}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
WRONG = {"type": "strin"}
ASKED = [{"role": "user", "content": "How warm?"}]


@pytest.fixture(scope="module", params=[TEMPLATE, KNOWING], ids=["template without tools", "template with tools"])
def http(request, tmp_path_factory):
    with served(tmp_path_factory.mktemp("served") / "m", request.param) as client:
        yield client


@pytest.fixture
def client(http):
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)


def said(client, **body):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 200} | body
    )


@pytest.mark.parametrize("seed", range(5))
def test_required_calls_keep_to_their_schemas_and_a_stream_adds_up_to_them(client, seed):
    (choice,) = said(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    schema = {"weather": CITY, "now": {"maxProperties": 0}}[call.function.name]
    validate(json.loads(call.function.arguments), schema)
    name, arguments, finish = "", "", None
    for chunk in said(client, tool_choice="required", parallel_tool_calls=False, seed=seed, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == (call.function.name, call.function.arguments, "tool_calls")


def test_the_function_that_is_named_is_called_once(client):
    named = {"type": "function", "function": {"name": "now"}}
    (choice,) = said(client, tool_choice=named, seed=1).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, choice.finish_reason) == ("now", "{}", "stop")


def test_an_agents_loop_sends_calls_and_their_answers_back(client):
    message = said(client, tool_choice="required", parallel_tool_calls=False, seed=0).choices[0].message
    answered = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    next_one = said(client, messages=[*ASKED, message.model_dump(), answered], seed=0, max_tokens=5).choices[0]
    assert next_one.finish_reason in ("length", "stop")
    assert next_one.message.content


def test_without_a_call_the_answer_is_text(client):
    free, strict = said(client, seed=3, max_tokens=9), [TOOLS[1] | {"function": {"name": "now", "strict": True}}]
    assert free.choices[0].message.tool_calls is None
    assert free.choices[0].message.content
    assert said(client, seed=3, max_tokens=9, tools=strict).choices[0].message.content
    none = said(client, seed=3, max_tokens=9, tool_choice="none")
    plain = client.chat.completions.create(model="tiny", messages=ASKED, seed=3, max_tokens=9)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < free.usage.prompt_tokens


def test_tokenize_counts_the_tools_that_a_chat_would_show(http):
    for given in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
        body = {"messages": ASKED, **given}
        counted = http.post("/tokenize", json=body).json()["count"]
        used = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
        assert counted == used
    refused = http.post("/tokenize", json={"prompt": "a", "tools": TOOLS}).json()["error"]
    assert refused["param"] == "tools"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
            "'x', and the tools are weather, now",
        ),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[0].function.name", "two tools have the name 'weather'"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "a schema of an object",
        ),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "Input should be 'function'"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be combined"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": WRONG}}}}],
                "tool_choice": "required",
            },
            "tools",
            "Invalid type: strin",
        ),
        ({"messages": [*ASKED, {"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "function": {"name": "a", "arguments": "{}"}}]}]}, "messages[1].tool_calls", "only the assistant"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "a", "arguments": "{"}}]}]},
         "messages[1].tool_calls[0].function.arguments", "not JSON"),
        ({"messages": [*ASKED, {"role": "tool"}]}, "messages[1].content", "may have no content"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_by_its_field(http, body, param, message):
    answer = http.post("/v1/chat/completions", json={"messages": ASKED, "tools": TOOLS} | body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def rendered(template, functions=TOOLS):
    TOKENIZER.chat_template = template
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
    ]
    body = ChatRequest.model_validate({"messages": messages, "tools": functions})
    try:
        return _rendered(TOKENIZER, body.messages, [definition(function) for function in body.functions])
    finally:
        TOKENIZER.chat_template = None


def test_a_template_without_tools_gets_them_as_text():
    text = rendered(TEMPLATE)
    assert text.startswith("system You can call functions.")
    assert json.dumps(CITY) in text
    assert 'assistant <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call> ' in text
    assert "user <tool_response>\n9\n</tool_response>" in text


def test_tools_stand_in_the_clients_own_system_message_where_there_is_one():
    TOKENIZER.chat_template = TEMPLATE
    try:
        messages = [Message(role="system", content="Be brief."), Message(role="user", content="a")]
        text = _rendered(TOKENIZER, messages, [{"name": "b"}])
    finally:
        TOKENIZER.chat_template = None
    assert text.count("system ") == 1
    assert text.endswith("Be brief. user a ")


def test_a_template_with_tools_gets_them_as_data():
    text = rendered(KNOWING)
    assert json.loads(text[: text.index("<tool_call>")])[0]["function"]["parameters"] == CITY
    assert text.endswith("user How warm?assistant Oslo tool 9 ".replace("?a", "? a"))


def test_messages_of_the_assistant_may_have_calls_alone():
    call = {"id": "1", "function": {"name": "a", "arguments": ""}}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    assert (message.text, message.tool_calls[0].function.arguments) == ("", "{}")
