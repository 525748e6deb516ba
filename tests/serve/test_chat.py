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


def test_what_the_chat_template_would_leave_out_is_refused_and_what_it_knows_is_honoured(tmp_path, student):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role[0] }}{{ m.name or '' }} {{ m.content }} {% endfor %}"
    )
    folder = save_model(tmp_path / "m", chat=True, template=template)
    user = {"role": "user", "content": "abc"}
    with endpoint(folder, max_model_len=40) as (url, _), httpx.Client(base_url=url) as http:

        def said(*messages):
            return http.post("/v1/chat/completions", json={"messages": messages, "seed": 1, "max_tokens": 9}).json()

        named = said(user | {"name": "k"})
        assert named["choices"][0]["message"]["content"] == text_of(expected(student, "uk abc ", n=9))
        for role in ("system", "developer"):
            error = said(user, {"role": role, "content": "d"})["error"]
            assert error["param"] == "messages[1]"
            assert f"leaves out this message of the role {role}" in error["message"]


def test_a_developers_message_is_the_systems_where_the_template_knows_no_developer(http, student):
    def said(role):
        messages = [{"role": role, "content": "d"}, {"role": "user", "content": "abc"}]
        answer = http.post("/v1/chat/completions", json={"messages": messages, "seed": 1, "max_tokens": 9}).json()
        return answer["choices"][0]["message"]["content"]

    assert said("developer") == said("system") == text_of(expected(student, "s d u abc ", n=9))
