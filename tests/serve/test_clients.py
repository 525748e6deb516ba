"""Clients from PyPI against the endpoint, without Ray."""

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_the_openai_client_completes_streams_and_chats(served):
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny", "teacher"]
    whole = client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=12, temperature=1.0)
    stream = client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "abc"}], seed=1, max_tokens=9
    )
    assert chat.usage.completion_tokens <= 9
    with pytest.raises(openai.NotFoundError, match="there are: tiny, teacher"):
        client.completions.create(model="gpt-4", prompt="abc")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="abc" * 50)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_an_answer_of_the_openai_client_can_be_sent_back_as_it_is(served):
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    first = [{"role": "developer", "content": "b"}, {"role": "user", "content": "abc"}]
    options = {"model": "tiny", "seed": 1, "max_tokens": 9, "tools": [], "response_format": {"type": "text"}}
    said = client.chat.completions.create(messages=first, **options).choices[0].message
    empty = [{"role": "assistant", "content": None, "annotations": []}, {"role": "assistant"}]
    for turns in ([said, *empty], [said.model_dump(), *empty], [{"role": "assistant", "content": said.content}]):
        messages = [*first, *turns[:1], {"role": "user", "content": "c"}, *turns[1:]]
        again = client.chat.completions.create(messages=messages, **options)
        assert again.usage.prompt_tokens == 6 + 4 + len(said.content) + 3 + 4 + 3 * len(turns[1:])


def test_schemathesis_finds_no_response_that_the_openapi_document_lacks(served):
    program = Path(sys.executable).parent / "schemathesis"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = [
        "run",
        f"{served[0]}/openapi.json",
        "--max-examples",
        "60",
        "--seed",
        "1",
        "--no-color",
        "--checks",
        checks,
    ]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
    models = served[1].models.values()
    wait_until(lambda: not any(model.async_engine.pending for model in models), "a request never ended")
