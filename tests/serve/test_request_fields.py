"""Which requests are accepted, and how the others are refused."""

import httpx
import pytest

from kforcing import PushForwardLM
from tests.endpoint import endpoint, save_model
from tests.models import make_backbone

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [99]}, None, "outside the vocabulary"),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": "a" * 60}, None, "exceed the context of 56 tokens"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**30}, None, ""),
        ({"max_tokens": "9"}, "max_tokens", "valid integer"),
        ({"max_tokens": 100}, None, "exceed the context of 56 tokens"),
        ({"temperature": -1}, "temperature", ""),
        ({"temperature": 1e-9}, None, "too small"),
        ({"top_p": 0}, "top_p", ""),
        ({"n": 1000}, "n", ""),
        ({"prompt": ["a"] * 100, "n": 2}, "n", "exceed 128 choices"),
        ({"n": 50}, None, "asks for 50 choices, and at most 44 can run and wait"),
        ({"prompt": [-1] * 100_000}, "prompt", ""),
        ({"prompt": "a" * 100_000}, "prompt", "exceeds the context"),
        ({f"x{i}": 1 for i in range(5000)}, None, "fields"),
        ({"stop": ""}, "stop", ""),
        ({"stop": ["a"] * 1_000_000}, None, ""),
        ({"k": 9}, None, "k=9"),
        ({"echo": True}, None, "echo is not supported"),
        ({"best_of": 3}, None, "best_of=3"),
        ({"logit_bias": {"1": 2.0}}, None, "logit_bias is not supported"),
        ({"nonsense": 1}, "nonsense", "Extra inputs"),
        ({"stream_options": {"include_usage": True}}, None, "need stream=true"),
        ({"seed": 2**64}, "seed", ""),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "send one of them"),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(http, body, param, message):
    answer = http.post("/v1/completions", json={"prompt": "abc"} | body)
    assert answer.status_code in (400, 413)
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


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


def test_unknown_paths_and_methods_are_answered_in_openais_shape(http):
    for answer, code in (
        (http.get("/v2/nothing"), 404),
        (http.get("/v1/completions"), 405),
        (http.get("/v1/models/x"), 404),
    ):
        assert answer.status_code == code
        assert answer.json()["error"]["message"]


def test_the_key_and_the_size_are_checked_before_the_body_is_parsed(tmp_path):
    with endpoint(save_model(tmp_path / "m"), api_key="secret", max_body=1000, max_model_len=40) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 200
        answer = httpx.get(f"{url}/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        good = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models", headers=good).status_code == 200
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
