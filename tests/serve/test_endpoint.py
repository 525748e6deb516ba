"""The endpoint over HTTP, without Ray: what clients may rely on, and the bugs that multi-token engines have had."""

import asyncio
import concurrent.futures
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from kforcing import PushForwardLM
from kforcing.engine import Engine, EngineConfig, Request
from kforcing.reference import decode
from tests.conftest import make_backbone, make_sequential
from tests.endpoint import EOS, endpoint, ids_of, save_model, text_of


@pytest.fixture(scope="module")
def student():
    return make_sequential(make_backbone())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("served") / "model", chat=True)
    with endpoint(folder, max_num_seqs=4, max_model_len=56, max_waiting=40) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served[0], timeout=30) as client:
        yield client


def complete(http, **body):
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "seed": 1, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http, path="/v1/completions", **body):
    """Parsed server-sent events; the last must be [DONE]."""
    base = {"model": "tiny", "seed": 1, "max_tokens": 12, "stream": True}
    base |= {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    with http.stream("POST", path, json=base | body) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expected(student, prompt="abc", n=12, seed=1, k=4, stop=frozenset([EOS])):
    return decode(student, ids_of(prompt), n, seed=seed, k=k, stop_ids=stop)


def without_eos(student, n):
    """A seed whose first n tokens are not end-of-text, and their text."""
    rows = ((seed, expected(student, n=n, stop=frozenset(), seed=seed)) for seed in range(100))
    return next((seed, text_of(row)) for seed, row in rows if EOS not in row)


# --- the nine bugs of engines that make several tokens a step ---------------------------------------------------------


def test_1_a_length_cap_does_not_hide_an_earlier_stop_and_nothing_leaks_after_it(http, student):
    seed, whole = without_eos(student, 11)
    for cap in range(1, 12):
        for at in range(cap):
            stop = whole[at]
            got = complete(http, seed=seed, max_tokens=cap, stop=stop, ignore_eos=True)["choices"][0]
            assert got["text"] == whole[: whole.index(stop)]
            assert (got["finish_reason"], got["stop_reason"]) == ("stop", stop)
        got = complete(http, seed=seed, max_tokens=cap, ignore_eos=True)["choices"][0]
        assert (got["text"], got["finish_reason"]) == (whole[:cap], "length")


def test_2_usage_counts_up_to_the_stop_and_no_further(http, student):
    seed, whole = without_eos(student, 11)
    for at in range(1, 10):
        stop = whole[at - 1 : at + 1]  # two tokens, inside and across blocks
        first = whole.index(stop)
        answer = complete(http, seed=seed, max_tokens=11, stop=[stop], ignore_eos=True)
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": first + 2, "total_tokens": first + 5}
        assert answer["choices"][0]["text"] == whole[:first]


def test_3_a_seed_gives_the_same_text_alone_in_a_crowd_and_from_generate(http, student):
    alone = complete(http, seed=7)["choices"][0]["text"]
    assert alone == text_of(expected(student, seed=7))
    assert alone == text_of(
        student.generate(torch.tensor([ids_of("abc")]), max_new_tokens=12, seed=7, eos_token_id=EOS)[0]
    )
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        bodies = [{"seed": 7}] + [
            {"seed": s, "prompt": "abcdefghij"[: 1 + s % 9], "max_tokens": 1 + s} for s in range(32)
        ]
        texts = list(pool.map(lambda body: complete(http, **body)["choices"][0]["text"], bodies))
    assert texts[0] == alone
    assert complete(http, seed=8)["choices"][0]["text"] != alone


def test_4_time_per_token_is_counted_by_token(http, served):
    service = served[1]
    before = metrics(http)
    complete(http, max_tokens=9, ignore_eos=True)
    after = metrics(http)
    name = 'kforcing_request_time_per_output_token_seconds_{}{{model="tiny",replica="test"}}'
    took = after[name.format("sum")] - before[name.format("sum")]
    end_to_end = 'kforcing_e2e_request_latency_seconds_sum{model="tiny",replica="test"}'
    assert after[name.format("count")] - before[name.format("count")] == 1
    assert 0 < took < (after[end_to_end] - before[end_to_end]) / 4, "by 8 tokens, not by 2 chunks"
    assert service.models["tiny"].engine.k == 4


def test_5_each_step_is_flushed_at_once(tmp_path):
    """With steps of 0.2 s, chunks come 0.2 s apart and not all at the end."""
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url) as http,
    ):
        engine = service.models["tiny"].engine
        step = engine.step
        engine.step = lambda: (time.sleep(0.2), step())[1]
        stamps = []
        body = {"prompt": "abc", "max_tokens": 12, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    stamps.append(time.perf_counter())
    assert len(stamps) == 3
    assert all(b - a > 0.15 for a, b in itertools.pairwise(stamps))


def test_6_health_fails_when_the_engine_is_dead_and_the_process_still_answers(tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url) as http,
    ):
        assert http.get("/health").status_code == 200

        def broken():
            raise RuntimeError("no more")

        service.models["tiny"].engine.step = broken
        answer = http.post("/v1/completions", json={"prompt": "abc"})
        assert answer.status_code == 503
        assert "no more" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        assert http.get("/live").status_code == 200
        with pytest.raises(RuntimeError, match="no more"):
            service.check_alive()
        again = http.post("/v1/completions", json={"prompt": "abc"})
        assert (again.status_code, again.json()["error"]["code"]) == (503, "engine_failed")


def test_6_health_proves_a_forward_pass_when_idle(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.service.PROOF_S", 0.0)
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url) as http,
    ):
        before = service.models["tiny"].engine.stats.steps
        assert http.get("/health").status_code == 200
        assert service.models["tiny"].engine.stats.steps == before + 1
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, "ignore_eos": True})
        assert metrics(http)['kforcing_tokens_per_forward{model="tiny",replica="test"}'] == 4, (
            "the probe's step is not counted"
        )


def test_7_the_line_is_bounded_and_says_when_to_come_back(tmp_path):
    with endpoint(save_model(tmp_path / "m"), max_num_seqs=1, max_model_len=56, max_waiting=2) as (url, service):
        engine = service.models["tiny"].engine
        step = engine.step
        engine.step = lambda: (time.sleep(0.15), step())[1]
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(8)))
    codes = sorted(a.status_code for a in answers)
    assert codes == [200] * 3 + [429] * 5
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_8_what_was_saved_is_what_is_served(http, student, tmp_path):
    student.save_pretrained(tmp_path)
    again = PushForwardLM.from_pretrained(tmp_path)
    for seed in range(5):
        assert complete(http, seed=seed)["choices"][0]["text"] == text_of(expected(again, seed=seed))


# (9, requests dropped on scale-down or redeploy, needs Serve: test_serve.py; the swap inside a replica is here.)


def test_9_a_swap_of_weights_drops_nothing(tmp_path):
    old, new = make_sequential(make_backbone()), make_sequential(make_backbone(seed=3))
    save_model(tmp_path / "old", old)
    save_model(tmp_path / "new", new)
    with (
        endpoint(tmp_path / "old", max_num_seqs=2, max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        engine = service.models["tiny"].engine
        step = engine.step
        engine.step = lambda: (time.sleep(0.1), step())[1]
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "seed": 2}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: http.post("/v1/completions", json=body).json())
            time.sleep(0.3)
            settings = service.settings.model_copy(update={"model": str(tmp_path / "new")})
            asyncio.run(service.configure(settings))
            after = http.post("/v1/completions", json=body).json()
            before = running.result()
    assert before["choices"][0]["text"] == text_of(expected(old, n=40, seed=2, stop=frozenset()))
    assert after["choices"][0]["text"] == text_of(expected(new, n=40, seed=2, stop=frozenset()))


# --- what the API says ------------------------------------------------------------------------------------------------


def test_streams_say_what_whole_answers_say(http):
    whole = complete(http)
    chunks = events(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    counts = [c["usage"]["completion_tokens"] for c in chunks[:-1]]
    assert counts == sorted(counts)
    assert all("usage" not in c for c in events(http))


def test_prompts_as_text_ids_and_lists_of_either(http, student):
    text = complete(http)["choices"][0]["text"]
    assert complete(http, prompt=ids_of("abc"))["choices"][0]["text"] == text
    several = complete(http, prompt=["abc", "cab", "b"])
    assert [c["text"] for c in several["choices"]] == [text_of(expected(student, p)) for p in ("abc", "cab", "b")]
    assert several["usage"]["prompt_tokens"] == 7
    assert complete(http, prompt=[ids_of("abc"), ids_of("cab")])["choices"] == several["choices"][:2]


def test_choices_of_n_differ_and_repeat(http):
    several = complete(http, n=4)["choices"]
    assert [c["index"] for c in several] == [0, 1, 2, 3]
    assert len({c["text"] for c in several}) > 1
    assert several[0]["text"] == complete(http)["choices"][0]["text"]
    assert several == complete(http, n=4)["choices"]
    streamed = ["", "", "", ""]
    for chunk in events(http, n=4):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == [c["text"] for c in several]


def test_without_a_seed_every_prompt_has_its_own(http):
    body = {"prompt": ["abc"] * 4, "max_tokens": 20, "ignore_eos": True}
    texts = [c["text"] for c in http.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) > 1


def test_settings_that_need_no_loading_do_not_load(served):
    service = served[1]
    before = dict(service.models)
    asyncio.run(service.configure(service.settings.model_copy(update={"drain_s": 7.0})))
    assert service.models == before
    assert service.settings.drain_s == 7.0


def test_the_teacher_is_served_beside_the_student_and_k_is_chosen_by_request(http, student):
    by_teacher = complete(http, model="teacher")["choices"][0]["text"]
    assert by_teacher == complete(http, k=1)["choices"][0]["text"]
    config = EngineConfig(max_num_seqs=1, max_model_len=56, coupling="gumbel")
    ar = Engine(student.backbone, config).generate([Request(ids_of("abc"), 12, 1, frozenset([EOS]))])
    assert by_teacher == text_of(ar[0].tokens)
    for k in (1, 2, 3, 4):
        assert complete(http, k=k)["choices"][0]["text"] == text_of(expected(student, k=k))


def test_chat_goes_through_the_template(http, student):
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


def test_a_model_without_a_template_says_so(tmp_path):
    with endpoint(save_model(tmp_path / "m"), max_model_len=40) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_the_openai_client_works(served):
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
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="tiny", prompt="abc", logprobs=2)


def test_a_client_that_goes_away_frees_its_slot(http, served):
    engine = served[1].models["tiny"].engine
    with http.stream(
        "POST", "/v1/completions", json={"prompt": "abc", "stream": True, "ignore_eos": True, "max_tokens": 53}
    ) as r:
        next(r.iter_lines())
    deadline = time.time() + 10
    while not engine.idle and time.time() < deadline:
        time.sleep(0.01)
    assert engine.idle
    reasons = metrics(http)
    assert reasons['kforcing_request_success_total{finished_reason="stop",model="tiny",replica="test"}'] > 0


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
        ({"n": 50}, None, "50 choices in one request, where 44 may run and wait"),
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
def test_what_cannot_be_honoured_is_refused_by_name(http, body, param, message):
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
def test_bodies_that_are_not_what_they_should_be(http, content):
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


def test_other_paths_and_methods_answer_in_the_same_shape(http):
    for answer, code in (
        (http.get("/v2/nothing"), 404),
        (http.get("/v1/completions"), 405),
        (http.get("/v1/models/x"), 404),
    ):
        assert answer.status_code == code
        assert answer.json()["error"]["message"]


def test_a_key_and_a_size_are_asked_for_before_anything_is_read(tmp_path):
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


def test_temperatures_an_argmax_student_does_not_know_are_refused(tmp_path):
    student = PushForwardLM.from_backbone(make_backbone(), 4)
    with endpoint(save_model(tmp_path / "m", student), max_model_len=40) as (url, service):
        assert list(service.models) == ["tiny"]
        for body in ({"temperature": 0.5}, {"top_p": 0.5}):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "abc"} | body)
            assert answer.status_code == 400
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "temperature": 1}).status_code == 200


def test_schemathesis_finds_no_answer_that_the_document_does_not_name(served):
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
    deadline = time.time() + 10
    while any(model.loop.pending for model in served[1].models.values()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(model.loop.pending for model in served[1].models.values()), "no stuck slot"


def metrics(http):
    """{name{labels}: value} of /metrics."""
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count_what_happened(http):
    own = '{model="tiny",replica="test"}'
    before = metrics(http)
    answer = complete(http, max_tokens=10, ignore_eos=True, stop="ZZ")
    after = metrics(http)

    def grew(name):
        return after[f"kforcing_{name}{own}"] - before[f"kforcing_{name}{own}"]

    assert grew("prompt_tokens_total") == 3
    assert grew("generation_tokens_total") == answer["usage"]["completion_tokens"] == 10
    assert grew("discarded_tokens_total") == 2, "three blocks of four"
    assert grew("engine_steps_total") == 3
    assert grew("time_to_first_token_seconds_count") == grew("request_queue_time_seconds_count") == 1
    assert after[f"kforcing_num_requests_running{own}"] == 0
    assert 0 < after[f"kforcing_tokens_per_forward{own}"] <= 4
    assert http.head("/metrics").status_code == 200


def test_200_streams_at_once_end_well(served):
    """Either a whole answer or a deliberate 429."""
    url, service = served

    async def one(client, seed):
        body = {"prompt": "abc", "max_tokens": 20, "seed": seed, "stream": True, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return answer.status_code, lines

    async def all_of_them():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(200)))

    answers = asyncio.run(all_of_them())
    assert {code for code, _ in answers} <= {200, 429}
    assert all(lines[-1] == "data: [DONE]" for code, lines in answers if code == 200)
    assert sum(code == 200 for code, _ in answers) >= 44
    assert service.models["tiny"].loop.pending == 0
    assert threading.active_count() < 50
