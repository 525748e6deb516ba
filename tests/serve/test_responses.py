"""OpenAI's Responses API."""

import json

import openai
import pytest

from tests.endpoint import expected, text_of

pytestmark = pytest.mark.cluster


def asked(**body):
    return {"model": "tiny", "seed": 1, "max_output_tokens": 9, "input": "abc", **body}


def streamed(http, **body):
    """(event, data) of a stream, whose events are numbered."""
    with http.stream("POST", "/v1/responses", json=asked(stream=True, **body)) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    pairs = [
        (kind.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for kind, data in zip(lines[::2], lines[1::2], strict=True)
    ]
    assert [data["sequence_number"] for _, data in pairs] == list(range(len(pairs)))
    assert all(kind == data["type"] for kind, data in pairs)
    return pairs


def test_a_response_has_the_text_of_the_chat_completion(http, student):
    answer = http.post("/v1/responses", json=asked()).json()
    said = text_of(expected(student, "u abc ", n=9))
    (message,) = answer["output"]
    assert message["content"] == [{"type": "output_text", "text": said, "annotations": []}]
    assert (answer["object"], message["role"]) == ("response", "assistant")
    usage = answer["usage"]
    assert usage["input_tokens"] == 6
    assert usage["total_tokens"] == 6 + usage["output_tokens"]
    assert usage["decoding"]["steps"] >= 1


def test_an_answer_that_the_limit_cuts_is_incomplete_and_one_that_ends_is_completed(http, student):
    short = http.post("/v1/responses", json=asked(max_output_tokens=1, ignore_eos=True)).json()
    assert (short["status"], short["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert len(expected(student, "u abc ", n=9)) < 9  # it ends by itself
    whole = http.post("/v1/responses", json=asked()).json()
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)


def test_the_events_of_a_stream_open_grow_and_repeat_the_whole(http):
    whole = http.post("/v1/responses", json=asked()).json()
    pairs = streamed(http)
    kinds = [kind.removeprefix("response.") for kind, _ in pairs]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", whole["status"]]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(data["delta"] for _, data in pairs[4:-4]) == text == pairs[-4][1]["text"]
    last = pairs[-1][1]["response"]
    assert last["output"][0]["content"][0]["text"] == text
    assert last["usage"] == whole["usage"]


def test_instructions_and_earlier_answers_are_messages_of_the_conversation(http, student):
    first = http.post("/v1/responses", json=asked(instructions="d")).json()
    assert first["instructions"] == "d"
    assert first["output"][0]["content"][0]["text"] == text_of(expected(student, "s d u abc ", n=9))
    turns = [{"role": "user", "content": "abc"}, first["output"][0], {"role": "user", "content": "c"}]
    again = http.post("/v1/responses", json=asked(input=turns, instructions="d")).json()
    said = first["output"][0]["content"][0]["text"]
    assert again["usage"]["input_tokens"] == len("s d u abc ") + len(f"a {said} ") + len("u c ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "a"}], "tool_choice": {"type": "function", "name": "b"}},
         "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.mode"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "a", "arguments": "{"}]}, "input[0].arguments"),
        ({"n": 2}, "n"),
        ({"max_tokens": 3}, "max_output_tokens"),
        ({"max_output_tokens": 900}, "max_output_tokens"),
        ({"input": "abc" * 50}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_its_path(http, body, param):
    answer = http.post("/v1/responses", json=asked(**body))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_fields_that_change_nothing_are_accepted(http):
    plain = http.post("/v1/responses", json=asked()).json()
    nothing = {
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": None, "summary": None},
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
        "store": True,
        "previous_response_id": None,
    }
    answer = http.post("/v1/responses", json=asked(**nothing)).json()
    assert answer["output"][0]["content"] == plain["output"][0]["content"]
    assert answer["metadata"] == {"a": "b"}


def test_the_openai_client_reads_a_response_and_its_stream(served):
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    options = {"model": "tiny", "input": "abc", "max_output_tokens": 9, "extra_body": {"seed": 1}}
    whole = client.responses.create(**options, store=True, text={"format": {"type": "text"}})
    assert whole.usage.output_tokens <= 9
    assert whole.usage.input_tokens_details.cached_tokens == 0
    with client.responses.stream(**options) as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert last.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
