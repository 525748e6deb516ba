"""The metrics of a replica."""

import asyncio

import httpx
import pytest

from serve.protocol.requests import CompletionRequest
from tests.endpoint import complete, endpoint, metrics, save_model

pytestmark = pytest.mark.cluster


def test_time_per_output_token_is_divided_by_tokens_and_not_by_chunks(http, served):
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


def test_metrics_count_tokens_steps_and_requests(http):
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


def test_a_request_whose_client_leaves_before_its_first_event_counts_as_aborted_once(tmp_path):
    with endpoint(save_model(tmp_path / "m"), max_model_len=56) as (url, service), httpx.Client(base_url=url) as http:

        async def left():
            request = await service.accept(CompletionRequest(prompt="abc"))
            request.close()
            request.close()

        asyncio.run(left())
        name = 'kforcing_request_success_total{finished_reason="abort",model="tiny",replica="test"}'
        assert metrics(http)[name] == 1
        complete(http)
        assert metrics(http)[name] == 1
