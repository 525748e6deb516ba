"""Log-probabilities and echo, in the shapes that clients read."""

import httpx
import openai
import pytest
import torch

from kforcing import PushForwardLM
from tests.endpoint import LETTERS, complete, endpoint, events, ids_of, save_model
from tests.models import make_backbone

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("logprobs") / "model", chat=True)
    with (
        endpoint(folder, acceptance="auto", max_num_seqs=4, max_model_len=56) as (url, _),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


@torch.no_grad()
def of_the_ar_model(student, prompt, text):
    """(L, V) log-probabilities at the place of each token of the text."""
    ids = torch.tensor([ids_of(prompt + text)])
    return student.backbone(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]


def close(values):
    """The width of a step, which the engine chooses by its speed, changes how logits are rounded."""
    return pytest.approx(values, abs=1e-4)


def check(record, expected_LV, text, n, offset=0):
    """The record of a text has the model's log-probabilities, and those of the n likeliest tokens."""
    assert "".join(record["tokens"]) == text
    assert record["text_offset"] == [offset + i for i in range(len(text))]
    for token, own, top, row_V in zip(*[record[x] for x in SHORT], expected_LV, strict=True):
        assert own == close(row_V[LETTERS.index(token)].item())
        best = {LETTERS[i] for i in row_V.topk(n).indices.tolist()}
        assert set(top) == best | {token}
        assert all(value == close(row_V[LETTERS.index(name)].item()) for name, value in top.items())


SHORT = ("tokens", "token_logprobs", "top_logprobs")


@pytest.fixture(scope="module")
def body(http):
    """A request whose text has 12 letters."""
    seeds = ({"seed": seed} for seed in range(100))
    return next(body for body in seeds if len(complete(http, **body)["choices"][0]["text"]) == 12)


@pytest.mark.parametrize("n", [0, 3])
def test_a_completion_has_those_of_the_ar_model_whole_and_streamed(http, student, body, n):
    choice = complete(http, logprobs=n, **body)["choices"][0]
    check(choice["logprobs"], of_the_ar_model(student, "abc", choice["text"]), choice["text"], n)
    chunks, whole = events(http, logprobs=n, **body), choice["logprobs"]
    streamed = {name: [x for c in chunks for x in c["choices"][0]["logprobs"][name]] for name in whole}
    assert (streamed["tokens"], streamed["text_offset"]) == (whole["tokens"], whole["text_offset"])
    assert streamed["token_logprobs"] == close(whole["token_logprobs"])
    assert [close(top) for top in whole["top_logprobs"]] == streamed["top_logprobs"]
    assert complete(http, **body)["choices"][0] == {**choice, "logprobs": None}


def test_tokens_behind_a_stop_string_have_none(http, body):
    text = complete(http, **body)["choices"][0]["text"]
    answer = complete(http, logprobs=1, stop=text[4:6], **body)
    assert answer["choices"][0]["text"] == text[:4]
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]


def test_echo_returns_the_prompt_and_scores_it(http, student, body):
    for prompt in ("abcdefgh", ids_of("abcdefgh")):
        plain = complete(http, prompt=prompt, **body)["choices"][0]["text"]
        choice = complete(http, prompt=prompt, echo=True, logprobs=2, **body)["choices"][0]
        assert choice["text"] == "abcdefgh" + plain
        record = choice["logprobs"]
        assert (record["token_logprobs"].pop(0), record["top_logprobs"].pop(0)) == (None, None)
        assert (record["tokens"].pop(0), record["text_offset"].pop(0)) == ("a", 0)
        check(record, of_the_ar_model(student, "a", choice["text"][1:]), choice["text"][1:], 2, offset=1)
        only = complete(http, prompt=prompt, echo=True, logprobs=2, max_tokens=0, **body)
        assert only["choices"][0]["text"] == "abcdefgh"
        assert only["choices"][0]["logprobs"]["token_logprobs"][1:] == close(record["token_logprobs"][:7])
        assert only["usage"]["completion_tokens"] == 0
        streamed = [chunk["choices"][0]["text"] for chunk in events(http, prompt=prompt, echo=True, **body)]
        assert "".join(streamed) == choice["text"]
    both = complete(http, prompt=["ab", "cd"], n=2, echo=True, **body)["choices"]
    assert [choice["text"][:2] for choice in both] == ["ab", "ab", "cd", "cd"]
    error = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}).json()["error"]
    assert (error["param"], error["message"]) == ("max_tokens", "max_tokens=0 needs echo=true; ask for at least 1")


def test_log_likelihoods_as_lm_eval_reads_them_are_those_of_the_ar_model(http, student):
    """The request and the sums of its `local-completions` model."""
    pairs = [("abcd", "efg"), ("hij", "aab"), ("k", "l")]
    body = {"prompt": [ids_of(a + b) for a, b in pairs], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    for (context, text), choice in zip(pairs, complete(http, **body)["choices"], strict=True):
        record, expected_LV = choice["logprobs"], of_the_ar_model(student, context, text)
        likelihood = sum(record["token_logprobs"][len(context) : -1])
        own = expected_LV[range(len(text)), ids_of(text)]
        assert likelihood == pytest.approx(own.sum().item(), abs=1e-3)
        places = zip(record["token_logprobs"], record["top_logprobs"], strict=True)
        greedy = [own == max(top.values()) for own, top in list(places)[len(context) : -1]]
        assert greedy == (expected_LV.argmax(-1) == torch.tensor(ids_of(text))).tolist()


def test_the_openai_client_reads_those_of_a_chat(http, student):
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "abc"}]
    options = {"model": "tiny", "messages": messages, "seed": 1, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    choice = client.chat.completions.create(logprobs=True, top_logprobs=2, **options).choices[0]
    rows = choice.logprobs.content
    text = "".join(row.token for row in rows)
    assert text.replace("|", "") == choice.message.content
    for row, row_V in zip(rows, of_the_ar_model(student, "u abc ", text), strict=True):
        assert bytes(row.bytes).decode() == row.token
        assert row.logprob == close(row_V[LETTERS.index(row.token)].item())
        assert [top.token for top in row.top_logprobs] == [LETTERS[i] for i in row_V.topk(2).indices.tolist()]
    stream = client.chat.completions.create(logprobs=True, stream=True, **options)
    streamed = [
        row for chunk in stream for row in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [(row.token, row.top_logprobs) for row in streamed] == [(row.token, []) for row in rows]
    assert client.chat.completions.create(logprobs=False, **options).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="top_logprobs=2 needs logprobs=true"):
        client.chat.completions.create(top_logprobs=2, **options)


def test_an_argmax_student_refuses_them_and_echoes(tmp_path):
    argmax = PushForwardLM.from_backbone(make_backbone(), 4)
    with endpoint(save_model(tmp_path / "m", argmax), max_model_len=40) as (url, _), httpx.Client(base_url=url) as http:
        for body in ({"logprobs": 0}, {"logprobs": 1, "echo": True}):
            error = http.post("/v1/completions", json={"prompt": "abc"} | body).json()["error"]
            assert error["param"] == "logprobs"
            assert "tokens have no probabilities" in error["message"]
        assert complete(http, echo=True)["choices"][0]["text"].startswith("abc")
