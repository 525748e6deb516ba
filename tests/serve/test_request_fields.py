"""Which requests are accepted, and how the others are refused."""

import httpx
import pytest

from kforcing import PushForwardLM
from tests.endpoint import complete, endpoint, save_model
from tests.models import make_backbone

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": [99]}, "prompt", "outside the vocabulary"),
        ({"prompt": [1, -1]}, "prompt[1]", "greater than or equal to 0"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]", "valid integer"),
        ({"prompt": ["a", ""]}, "prompt[1]", "at least 1 character"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 needs echo=true"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 10**30}, "max_tokens", ""),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", ""),
        ({"temperature": 1e-9}, "temperature", "too small"),
        ({"top_p": 0}, "top_p", ""),
        ({"n": 1000}, "n", ""),
        ({"prompt": ["a"] * 100, "n": 2}, "n", "exceed 128 choices"),
        ({"n": 50}, "n", "50 choices are asked for, and at most 44 can run and wait"),
        ({"prompt": [-1] * 100_000}, "prompt[0]", ""),
        ({f"x{i}": 1 for i in range(5000)}, None, "fields"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 65}, "stop", "at most 64 items"),
        ({"stop": ["a", 5]}, "stop[1]", "valid string"),
        ({"stop": ["a"] * 1_000_000}, None, ""),
        ({"k": 9}, "k", "k=9"),
        ({"suffix": "x"}, "suffix", "suffix='x' is not supported"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"best_of": 3}, "best_of", "best_of=3"),
        ({"logit_bias": {"99": 2.0}}, "logit_bias", "logit_bias of token 99, which is outside the vocabulary"),
        ({"logit_bias": {"1": 200}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": {"a": 2}}, "logit_bias.a", "match pattern"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens=9 is more than max_tokens=8"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
        ({"nonsense": 1}, "nonsense", "nonsense=1 is not supported here; leave it out"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs json_schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "type=json_object has no json_schema",
        ),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "send one of them"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"length_penalty": 1.2}, "length_penalty", "is not supported"),
        ({"store": True}, "store", "is not supported"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "is not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "need stream=true"),
        ({"seed": 2**64}, "seed", ""),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "send one of them"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(http, body, param, message):
    answer = http.post("/v1/completions", json={"prompt": "abc"} | body)
    assert answer.status_code in (400, 413)
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": None, "tools": None, "tool_choice": "auto", "reasoning_effort": None, "anything": None},
        {"store": False, "service_tier": "auto", "repetition_penalty": 1.0, "min_p": 0, "logit_bias": {"1": 0}},
        {"user": "u", "metadata": {"a": 1}, "safety_identifier": "s", "prompt_cache_key": "c", "echo": False},
        {"stop": [f"{i}stop" for i in range(18)], "stream_options": {}},
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(http, body):
    assert complete(http, **body)["choices"] == complete(http)["choices"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a" * 60}, "prompt"),
        ("completions", {"prompt": "a" * 100_000}, "prompt"),
        ("completions", {"prompt": "abc", "max_tokens": 100}, "max_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 60}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100}, "max_tokens"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_in_the_words_that_clients_recognise(http, path, body, param):
    error = http.post(f"/v1/{path}", json=body).json()["error"]
    assert error["message"].startswith("This model's maximum context length is 56 tokens")
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "[0].content[0].image_url",
            "",
        ),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "[1].role", "'assistant' or 'tool'"),
        ([{"role": "user", "content": None}], "[0].content", "only messages of the assistant may have no content"),
        ([{"role": "user"}], "[0].content", "only messages of the assistant may have no content"),
        (
            [{"role": "user", "content": "a", "tool_calls": [{"id": "x"}]}],
            "[0].tool_calls[0].function",
            "Field required",
        ),
        ([{"role": "user", "content": "a", "name": "b"}], "[0].name", "has no place for names"),
        ([{"role": "user", "content": ["a"]}], "[0].content[0]", ""),
    ],
)
def test_what_a_message_cannot_have_is_refused_by_its_whole_path(http, messages, param, message):
    error = http.post("/v1/chat/completions", json={"messages": messages}).json()["error"]
    assert error["param"] == f"messages{param}"
    assert message in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "user": "\\udfff", "model": "\\ud800"}',
    ],
    ids=lambda c: c[:20].decode("latin1"),
)
def test_a_malformed_body_is_answered_with_an_error_in_openais_shape(http, content):
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


def test_a_body_that_is_not_json_or_has_another_content_type_is_told_so(http):
    def error(content, **headers):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        return answer.json()["error"]

    syntax = error(b'{"prompt": }', **{"content-type": "application/json"})
    assert (syntax["message"], syntax["param"]) == ("the body is not JSON: Expecting value at character 11", None)
    needs = "the body needs the header Content-Type: application/json; it has "
    assert error(b'{"prompt": "a"}')["message"] == f"{needs}none"
    form = "application/x-www-form-urlencoded"
    assert error(b'{"prompt": "a"}', **{"content-type": form})["message"] == f"{needs}'{form}'"
    assert error(b"[]", **{"content-type": "application/json"})["message"] == "the body must be a JSON object"


def test_unknown_paths_and_methods_are_answered_in_openais_shape(http):
    for answer, code in (
        (http.get("/v2/nothing"), 404),
        (http.get("/v1/completions"), 405),
        (http.get("/v1/models/x"), 404),
    ):
        assert answer.status_code == code
        assert answer.json()["error"]["message"]
    assert http.get("/v2/nothing").json()["error"]["message"] == "there is no GET /v2/nothing here"
    assert http.get("/v1/completions").headers["allow"] == "POST"
    assert http.post("/health").headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("embeddings", {"input": "abc"}, 404, "there is no POST /v1/embeddings here"),
        ("completions", {"prompt": "a", "use_beam_search": True}, 400, "use_beam_search=True is not supported"),
        ("completions", {"prompt": "a", "lora_request": {"lora_name": "a"}}, 400, "lora_request="),
        ("completions", {"prompt": "a", "model": "tiny-lora"}, 404, "'tiny-lora' is not served here; there are: tiny"),
    ],
)
def test_what_is_not_served_here_is_refused_by_name(http, path, body, status, message):
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_head_is_answered_like_get_without_a_body(http):
    for path in ("/health", "/live", "/metrics", "/v1/models", "/v1/models/tiny"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers["content-type"] == http.get(path).headers["content-type"]
    assert http.head("/v1/completions").status_code == 405


def test_web_pages_of_other_origins_may_use_the_endpoint_unless_it_names_its_origins(tmp_path):
    preflight = {
        "Origin": "http://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    page, key = {"Origin": "http://page.example"}, {"Authorization": "Bearer secret"}
    folder = save_model(tmp_path / "m")
    with endpoint(folder, api_key="secret", max_model_len=40) as (url, _):
        asked = httpx.options(f"{url}/v1/completions", headers=preflight)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "*")
        assert "authorization" in asked.headers["access-control-allow-headers"]
        for headers, status in ((page, 401), (page | key, 200)):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
    with endpoint(folder, origins=["http://mine.example"], max_model_len=40) as (url, _):
        assert httpx.options(f"{url}/v1/completions", headers=preflight).status_code == 400
        own = httpx.get(f"{url}/v1/models", headers={"Origin": "http://mine.example"})
        assert own.headers["access-control-allow-origin"] == "http://mine.example"
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=page).headers


def test_the_key_and_the_size_are_checked_before_the_body_is_parsed(tmp_path):
    with endpoint(save_model(tmp_path / "m"), api_key="secret", max_body=1000, max_model_len=40) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 200
        answer = httpx.get(f"{url}/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        for value in ("Bearer secret", "bearer secret", "BEARER  secret"):
            good = {"Authorization": value}
            assert httpx.get(f"{url}/v1/models", headers=good).status_code == 200
        for value in ("Bearer", "secret", "Basic secret", "Bearer secrets"):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": value}).status_code == 401
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        big = httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 2000}, headers=good)
        assert (big.status_code, big.json()["error"]["code"]) == (413, "request_too_large")
        assert (
            httpx.post(
                f"{url}/v1/completions", json={"prompt": "a"}, headers={"Authorization": "Bearer sécret".encode()}
            ).status_code
            == 401
        )


def test_a_temperature_that_an_argmax_student_was_not_trained_for_is_refused(tmp_path):
    student = PushForwardLM.from_backbone(make_backbone(), 4)
    with endpoint(save_model(tmp_path / "m", student), max_model_len=40) as (url, service):
        assert list(service.models) == ["tiny"]
        for body in ({"temperature": 0.5}, {"top_p": 0.5}):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "abc"} | body)
            assert answer.status_code == 400
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "temperature": 1}).status_code == 200
