"""Chat completions."""

import httpx
import pytest

from tests.endpoint import endpoint, events, expected, save_model, text_of

pytestmark = pytest.mark.cluster


def test_chat_messages_are_formatted_by_the_chat_template(http, student):
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
        "seed": 1,
        "max_completion_tokens": 9,
    }
    answer = http.post("/v1/chat/completions", json=body).json()
    said = text_of(expected(student, "u abc ", n=9))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": said}
    chunks = events(http, "/v1/chat/completions", max_tokens=9)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == said


def test_chat_is_refused_for_a_model_without_a_chat_template(tmp_path):
    with endpoint(save_model(tmp_path / "m"), max_model_len=40) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
