"""Structured outputs through HTTP: the fields of OpenAI and vLLM, in every mode, streamed or not."""

import contextlib
import json
import random
import re
from copy import deepcopy

import httpx
import openai
import pytest
from jsonschema import validate

from tests.endpoint import endpoint, events
from tests.kforcing.schemas import schema
from tests.kforcing.test_structured import TOKENIZER, student

pytestmark = pytest.mark.cluster
SCHEMA = schema(random.Random(1))
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@contextlib.contextmanager
def served(folder, template, **settings):
    """A client of an endpoint whose model has a tokenizer of bytes."""
    model, tokenizer = deepcopy(student()), deepcopy(TOKENIZER)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with (
        endpoint(folder, max_num_seqs=4, max_model_len=2000, acceptance="exact", **settings) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served") / "m", TEMPLATE) as client:
        yield client


def completed(http, **body):
    answer = http.post("/v1/completions", json={"prompt": "ab", "seed": 1, "max_tokens": 300, **body})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"]


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_holds_through_openais_client_and_the_text_is_the_teachers(http, seed):
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none")

    def said(model):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "abc"}],
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
        )
        return answer.choices[0].message.content

    validate(json.loads(said("tiny")), SCHEMA)
    assert said("tiny") == said("teacher")


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"regex": "(ab|c){2,5}"}}, "(ab|c){2,5}"),
        ({"guided_regex": "(ab|c){2,5}"}, "(ab|c){2,5}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
    ids=str,
)
@pytest.mark.parametrize("acceptance", ["exact", "fixed"])
def test_each_field_gives_the_answer_its_form(http, body, pattern, acceptance):
    assert re.fullmatch(pattern, completed(http, acceptance=acceptance, **body))


def test_a_json_object_is_an_object(http):
    biased = {str(TOKENIZER.convert_tokens_to_ids("}")): 30}  # a random model would go on for long
    text = completed(http, response_format={"type": "json_object"}, logit_bias=biased)
    assert isinstance(json.loads(text), dict)


def test_a_stream_adds_up_to_the_whole_text(http):
    body = {"structured_outputs": {"json": SCHEMA}, "max_tokens": 300, "prompt": "ab"}
    assert "".join(c["choices"][0]["text"] for c in events(http, **body)) == completed(http, **body)


def test_responses_take_a_schema_too(http):
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    answer = http.post("/v1/responses", json={"input": "ab", "seed": 1, "text": text}).json()
    validate(json.loads(answer["output"][0]["content"][0]["text"]), SCHEMA)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ("completions", {"structured_outputs": {}}, "structured_outputs", "need one of json, json_object"),
        ("completions", {"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "is not supported"),
        ("completions", {"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "ends with EOS"),
        (
            "completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
            "response_format",
            "Invalid type: strin",
        ),
        ("responses", {"text": {"format": {"type": "json_schema", "schema": {"$ref": "#/x"}}}}, "text.format", "'/x'"),
    ],
)
def test_a_form_that_is_none_is_refused_by_its_field(http, path, body, param, message):
    prompt = {"input": "ab"} if path == "responses" else {"prompt": "ab"}
    answer = http.post(f"/v1/{path}", json=prompt | body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
