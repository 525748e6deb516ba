"""Server-sent events: their content, when they are sent, and what happens when clients disconnect or are many."""

import asyncio
import json
import threading

import httpx
import pytest
from fastapi import Request

from serve.service import AcceptedRequest
from serve.streaming import unless_disconnected
from tests.endpoint import HeldSteps, complete, endpoint, events, metrics, save_model, without_eos
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_a_stream_has_the_text_and_the_usage_of_the_whole_answer(http):
    whole = complete(http)
    chunks = events(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    counts = [c["usage"]["completion_tokens"] for c in chunks[:-1]]
    assert counts == sorted(counts)
    assert all("usage" not in c for c in events(http))


def test_each_step_is_sent_before_the_next_one_begins(student, tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        steps = HeldSteps(service.models["tiny"].engine)
        seed, whole = without_eos(student, 12)
        body = {"prompt": "abc", "max_tokens": 12, "seed": seed, "stream": True, "ignore_eos": True}
        texts = []
        steps.release(1)
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                    assert steps.done == len(texts)
                    steps.release(1)
    assert texts == [whole[:4], whole[4:8], whole[8:]]


def test_a_client_that_disconnects_frees_its_slot(tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=1, max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        model = service.models["tiny"]
        steps = HeldSteps(model.engine)
        steps.release(1)
        body = {"prompt": "abc", "stream": True, "ignore_eos": True, "max_tokens": 53}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        name = 'kforcing_request_success_total{finished_reason="abort",model="tiny",replica="test"}'
        wait_until(lambda: metrics(http)[name] == 1, "the server never noticed the disconnection")
        steps.release(2)  # the step during which the request was cancelled, and the one that frees its slot
        wait_until(lambda: model.engine.idle, "the slot was never freed")
        assert steps.done <= 3, "53 tokens need 14 steps"


def test_a_client_that_leaves_before_its_whole_answer_frees_its_slot(tmp_path):
    with endpoint(save_model(tmp_path / "m"), max_num_seqs=1, max_model_len=56) as (url, service):
        model = service.models["tiny"]
        steps = HeldSteps(model.engine)
        body = {"prompt": "abc", "ignore_eos": True, "max_tokens": 53}
        for _ in range(4):
            with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.2) as leaving:
                leaving.post("/v1/completions", json=body)
        wait_until(lambda: all(p.cancelled for p in open_requests(model)), "the server never noticed who had left")
        steps.release(2)
        wait_until(lambda: model.async_engine.pending == 0 and model.engine.idle, "the slots were never freed")
        assert steps.done <= 2, "53 tokens need 14 steps"


def test_a_request_accepted_in_the_turn_in_which_its_handler_is_cancelled_is_closed():
    class Accepted(AcceptedRequest):
        closed = False

        def __init__(self):
            pass

        def close(self):
            self.closed = True

    async def scenario():
        accepted = Accepted()

        async def accept():
            handler.cancel()
            return accepted

        async def receive():
            await asyncio.Event().wait()

        handler = asyncio.create_task(unless_disconnected(Request({"type": "http"}, receive), accept()))
        with pytest.raises(asyncio.CancelledError):
            await handler
        return accepted.closed

    assert asyncio.run(scenario())


def open_requests(model):
    return [*model.async_engine._inbox, *model.async_engine._open.values()]


def test_200_concurrent_streams_end_with_a_whole_answer_or_with_429(served):
    """Either a whole answer or a deliberate 429."""
    url, service = served
    threads = threading.active_count()

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
    assert service.models["tiny"].async_engine.pending == 0
    assert threading.active_count() < threads + 48
