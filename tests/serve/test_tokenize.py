"""/tokenize, /detokenize and /version."""

import pytest

from kforcing.version import __version__
from tests.endpoint import ids_of

pytestmark = pytest.mark.cluster


def test_tokens_are_those_that_a_request_would_have(http):
    answer = http.post("/tokenize", json={"prompt": "abc"}).json()
    assert answer == {"count": 3, "max_model_len": 56, "tokens": [0, 1, 2], "token_strs": ["a", "b", "c"]}
    chat = {"messages": [{"role": "user", "content": "abc"}]}
    tokens = http.post("/tokenize", json={"model": "teacher"} | chat).json()["tokens"]
    assert tokens == ids_of("u abc ")
    used = http.post("/v1/chat/completions", json=chat | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert used == len(tokens)
    assert http.post("/tokenize", json={"prompt": "abc", "add_special_tokens": False}).json()["count"] == 3


def test_the_text_of_tokens_has_the_special_ones_too(http):
    assert http.post("/detokenize", json={"tokens": ids_of("ab|c")}).json() == {"prompt": "ab|c"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param", "status"),
    [
        ("tokenize", {}, "prompt", 400),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", 400),
        ("tokenize", {"prompt": "a" * 10_000}, "prompt", 400),
        ("tokenize", {"prompt": "a", "model": "x"}, "model", 404),
        ("detokenize", {"tokens": [-1]}, "tokens[0]", 400),
        ("detokenize", {"tokens": [1] * 57}, "tokens", 400),
    ],
    ids=str,
)
def test_what_cannot_be_tokenised_is_refused_by_name(http, path, body, param, status):
    answer = http.post(f"/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_the_version_is_that_of_the_package(http):
    assert http.get("/version").json() == {"version": __version__}
