"""The life of a replica: health, the waiting queue, and changes of its models."""

import asyncio
import concurrent.futures
import gc
import shutil
import threading
import weakref
from pathlib import Path

import httpx
import pytest

from serve.engine_thread import STEPS
from serve.models import fetch_models, load_models
from serve.protocol.requests import CompletionRequest
from serve.service import Service
from serve.settings import Settings
from tests.endpoint import HeldSteps, complete, endpoint, expected, metrics, save_model, text_of
from tests.models import make_backbone, make_sequential
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def test_health_fails_when_the_engine_is_dead_while_the_process_still_answers(tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url, timeout=30) as http,
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


def test_health_runs_a_forward_pass_when_the_model_is_idle(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.service.PROOF_S", 0.0)
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=40) as (url, service),
        httpx.Client(base_url=url, timeout=30) as http,
    ):
        before = service.models["tiny"].engine.stats.steps
        assert http.get("/health").status_code == 200
        assert service.models["tiny"].engine.stats.steps == before + 1
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, "ignore_eos": True})
        assert metrics(http)['kforcing_tokens_per_forward{model="tiny",replica="test"}'] == 4, (
            "the probe's step is not counted"
        )


def test_a_full_waiting_queue_is_answered_with_429_and_retry_after(tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=1, max_model_len=56, max_waiting=2) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        model = service.models["tiny"]
        steps = HeldSteps(model.engine)
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True}
        accepted = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(3)]
        wait_until(lambda: model.async_engine.pending == 3, "three requests never filled the slot and the queue")
        refused = [http.post("/v1/completions", json=body) for _ in range(5)]
        steps.release(1000)
        assert [answer.result().status_code for answer in accepted] == [200] * 3
    assert [answer.status_code for answer in refused] == [429] * 5
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_a_change_of_weights_lets_running_requests_finish_with_the_old_ones(tmp_path):
    old, new = make_sequential(make_backbone()), make_sequential(make_backbone(seed=3))
    save_model(tmp_path / "old", old)
    save_model(tmp_path / "new", new)
    with (
        endpoint(tmp_path / "old", max_num_seqs=2, max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        steps = HeldSteps(service.models["tiny"].engine)
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "seed": 2}
        running = pool.submit(lambda: http.post("/v1/completions", json=body).json())
        steps.release(3)
        wait_until(lambda: steps.done == 3, "the request never began")
        settings = service.settings.model_copy(update={"model": str(tmp_path / "new")})
        asyncio.run(service.configure(settings))
        steps.release(1000)
        after = http.post("/v1/completions", json=body).json()
        before = running.result()
    assert before["choices"][0]["text"] == text_of(expected(old, n=40, seed=2, stop=frozenset()))
    assert after["choices"][0]["text"] == text_of(expected(new, n=40, seed=2, stop=frozenset()))


def test_a_request_whose_model_is_replaced_while_its_prompt_is_tokenised_goes_to_the_new_one(tmp_path):
    new = make_sequential(make_backbone(seed=3))
    save_model(tmp_path / "old")
    save_model(tmp_path / "new", new)
    with (
        endpoint(tmp_path / "old", max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        model = service.models["tiny"]
        tokenizer, begun, permit = model.tokenizer, threading.Event(), threading.Event()

        def held(text, **options):
            begun.set()
            assert permit.wait(timeout=60)
            return tokenizer(text, **options)

        model.tokenizer = held
        body = {"prompt": "abc", "max_tokens": 12, "ignore_eos": True, "seed": 2}
        waiting = pool.submit(http.post, "/v1/completions", json=body)
        assert begun.wait(timeout=60)
        asyncio.run(service.configure(service.settings.model_copy(update={"model": str(tmp_path / "new")})))
        permit.set()
        answer = waiting.result()
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == text_of(expected(new, n=12, seed=2, stop=frozenset()))


def test_a_change_of_other_settings_does_not_load_the_models_again(served):
    service = served[1]
    before = dict(service.models)
    asyncio.run(service.configure(service.settings.model_copy(update={"drain_s": 7.0})))
    assert service.models == before
    assert service.settings.drain_s == 7.0


def test_a_request_with_many_choices_delays_another_by_the_time_of_one_choice(tmp_path):
    check_turns(tmp_path, [("", {"n": 8})], ("", {}))


def test_many_requests_of_one_client_delay_another_client_by_the_time_of_one_of_them(tmp_path):
    check_turns(tmp_path, [("Bearer one", {})] * 8, ("Bearer two", {}))


def check_turns(tmp_path, first, second):
    """With two slots and two steps a choice, the second client's is among the first four, whatever waited before it."""
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=2, max_model_len=56, max_waiting=40) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(9) as pool,
    ):
        model = service.models["tiny"]
        steps = HeldSteps(model.engine)

        def ask(key, fields):
            body = {"prompt": "abc", "max_tokens": 8, "ignore_eos": True, **fields}
            headers = {"authorization": key} if key else {}
            return pool.submit(http.post, "/v1/completions", json=body, headers=headers)

        crowd = [ask(*each) for each in first]
        wait_until(lambda: model.async_engine.pending == 8, "eight choices never waited")
        late = ask(*second)
        wait_until(lambda: model.async_engine.pending == 9, "the last request never waited")
        steps.release(4)
        assert late.result(timeout=30).status_code == 200
        assert steps.done <= 4, "all choices before it need eight"
        steps.release(100)
        assert {each.result(timeout=30).status_code for each in crowd} == {200}


@pytest.fixture
def stepped(tmp_path):
    """A function that sends a request, an engine with four slots whose steps seem to take hours, and its held steps."""
    with (
        endpoint(save_model(tmp_path / "m"), max_num_seqs=4, max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):
        engine = service.models["tiny"].async_engine
        steps = HeldSteps(engine.engine)
        engine._step_times.extend([8000.0] * STEPS)

        def ask(tokens=4, n=1):
            body = {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True, "n": n}
            return pool.submit(http.post, "/v1/completions", json=body)

        yield ask, engine, steps
        steps.release(1000)


def test_a_step_waits_for_as_many_requests_as_the_one_before_has_ended(stepped, monkeypatch):
    monkeypatch.setattr("serve.engine_thread.SUCCESSORS_S", 1000.0)
    ask, engine, steps = stepped
    long = ask(tokens=40)
    wait_until(lambda: len(engine._open) == 1, "the first step never began")
    ending = [ask(), ask()]
    wait_until(lambda: engine.pending == 3, "the others never came")
    steps.release(3)
    assert {each.result(timeout=60).status_code for each in ending} == {200}
    assert (steps.done, engine._ended) == (2, 2)
    first = ask()
    wait_until(lambda: len(engine._inbox) == 1, "the first successor never came")
    second = ask()
    assert {each.result(timeout=60).status_code for each in (first, second)} == {200}
    assert steps.done == 3, "one step for both"
    monkeypatch.setattr("serve.engine_thread.SUCCESSORS_S", 0.0)
    engine._wait_until = 0.0
    steps.release(1)
    assert ask().result(timeout=60).status_code == 200, "after that time one may come alone"
    steps.release(1000)
    assert long.result(timeout=60).status_code == 200


def test_where_nothing_runs_a_request_begins_at_once(stepped, monkeypatch):
    monkeypatch.setattr("serve.engine_thread.SUCCESSORS_S", 1000.0)
    ask, engine, steps = stepped
    earlier = ask(tokens=8)
    wait_until(lambda: len(engine._open) == 1, "the first step never began")
    ending = [earlier, ask()]
    wait_until(lambda: engine.pending == 2, "the other never came")
    steps.release(3)
    assert {each.result(timeout=60).status_code for each in ending} == {200}
    assert (steps.done, engine._ended) == (2, 2)
    assert ask().result(timeout=60).status_code == 200


def test_choices_of_one_request_have_one_successor_which_a_step_awaits_for_20_ms_at_most(stepped):
    ask, engine, steps = stepped
    steps.release(1)
    assert ask(n=2).result(timeout=60).status_code == 200
    assert (steps.done, engine._ended) == (1, 1)
    assert engine._wait_until - engine.last_step == pytest.approx(0.02)


def test_prompts_are_tokenised_one_by_one_while_the_endpoint_answers_others(tmp_path):
    with (
        endpoint(save_model(tmp_path / "m"), max_model_len=56) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        model = service.models["tiny"]
        tokenizer, permits, seen = model.tokenizer, threading.Semaphore(0), []

        def held(text, **options):
            seen.append(text)
            assert permits.acquire(timeout=60)
            return tokenizer(text, **options)

        model.tokenizer = held
        many = pool.submit(http.post, "/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 1})
        wait_until(lambda: seen == ["a"], "tokenising never began")
        assert http.get("/live").status_code == 200
        one = pool.submit(http.post, "/v1/completions", json={"prompt": "d", "max_tokens": 1})
        assert http.get("/v1/models").status_code == 200
        wait_until(lambda: service._tokenising._work_queue.qsize() == 1, "the other prompt never waited")
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.2) as leaving:
            leaving.post("/v1/completions", json={"prompt": ["never"] * 9, "max_tokens": 1})
        permits.release(100)
        assert [answer.result().status_code for answer in (many, one)] == [200, 200]
        for _ in range(5):
            http.post("/v1/completions", json={"prompt": "e", "max_tokens": 1})
    assert seen.count("never") <= 1, "the client who sent it has left"
    assert [text for text in seen if text in "abcd"] == ["a", "d", "b", "c"]


def test_a_deployment_that_cannot_be_loaded_leaves_the_one_before(tmp_path):
    old, bad = save_model(tmp_path / "old"), save_model(tmp_path / "bad", make_sequential(make_backbone(seed=3)))
    (bad / "model.safetensors").unlink()
    with endpoint(old, max_model_len=40) as (url, service), httpx.Client(base_url=url, timeout=60) as http:
        before = complete(http)["choices"]
        failed = 'kforcing_deployment_failed{replica="test"}'
        assert metrics(http)[failed] == 0
        good = service.settings
        for _ in range(2):
            asyncio.run(service.configure(good.model_copy(update={"model": str(bad)})))
            assert complete(http)["choices"] == before
            assert metrics(http)[failed] == 1
            health = http.get("/health")
            assert health.status_code == 200
            assert f"model={bad} cannot be served: FileNotFoundError" in health.json()["failed_deployment"]
        asyncio.run(service.configure(good))
        assert (metrics(http)[failed], http.get("/health").json()) == (0, {"status": "ok"})
        asyncio.run(service.configure(good.model_copy(update={"model": str(bad)})))
        assert metrics(http)[failed] == 1
        asyncio.run(service.configure(good.model_copy(update={"max_num_seqs": 2})))
        assert (metrics(http)[failed], http.get("/health").json()) == (0, {"status": "ok"})
        assert complete(http)["choices"] == before


def test_a_new_replica_that_cannot_load_its_deployment_serves_the_one_before_or_none(tmp_path):
    good, bad = save_model(tmp_path / "good"), Settings(model=str(tmp_path / "none"))
    service = Service("test")
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        asyncio.run(service.configure(bad))
    before = Settings(model=str(good), max_model_len=40)
    asyncio.run(service.configure(bad, before))
    assert list(service.models) == ["good", "teacher"]
    assert (service.settings, service.metrics.failed.labels("test")._value.get()) == (before, 1)
    assert "model=" in service.failed_deployment


def test_models_that_are_loaded_after_a_drain_are_never_in_memory_beside_the_former_ones(tmp_path, monkeypatch):
    old, new = make_sequential(make_backbone()), make_sequential(make_backbone(seed=3))
    save_model(tmp_path / "old", old)
    save_model(tmp_path / "new", new)
    with (
        endpoint(tmp_path / "old", max_num_seqs=2, max_model_len=56, load_after_drain=True) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        engines = [weakref.ref(model.engine) for model in service.models.values()]
        steps = HeldSteps(service.models["tiny"].engine)
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "seed": 2}
        running = pool.submit(lambda: http.post("/v1/completions", json=body).json())
        steps.release(3)
        wait_until(lambda: steps.done == 3, "the request never began")
        alive = []

        def load(*given):
            alive.append([engine() for engine in engines])
            return load_models(*given)

        monkeypatch.setattr("serve.service.load_models", load)
        swapped = service.settings.model_copy(update={"model": str(tmp_path / "new")})
        change = pool.submit(lambda: asyncio.run(service.configure(swapped)))
        wait_until(lambda: not service.models, "the drain never began")
        assert http.get("/health").status_code == 503
        waiting = [
            pool.submit(lambda: http.post("/v1/completions", json=body).json()),
            pool.submit(lambda: http.get("/v1/models").json()),
        ]
        steps.release(1000)
        steps = None  # it refers to the engine
        change.result(timeout=60)
        before, (after, models) = running.result(timeout=60), (each.result(timeout=60) for each in waiting)
        assert http.get("/health").status_code == 200
    assert alive == [[None, None]]
    assert before["choices"][0]["text"] == text_of(expected(old, n=40, seed=2, stop=frozenset()))
    assert after["choices"][0]["text"] == text_of(expected(new, n=40, seed=2, stop=frozenset()))
    assert [card["id"] for card in models["data"]] == ["tiny", "teacher"]


def test_where_a_model_cannot_be_loaded_after_a_drain_the_former_one_is_loaded_again(tmp_path, monkeypatch):
    old, bad = save_model(tmp_path / "old"), save_model(tmp_path / "bad")

    def fetch(settings):
        folders = fetch_models(settings)
        (bad / "model.safetensors").unlink()
        return folders

    with (
        endpoint(old, max_model_len=40, load_after_drain=True) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        before, former = complete(http)["choices"], service.models["tiny"]
        monkeypatch.setattr("serve.service.fetch_models", fetch)
        asyncio.run(service.configure(service.settings.model_copy(update={"model": str(bad)})))
        assert service.models["tiny"] is not former
        assert complete(http)["choices"] == before
        assert f"model={bad} cannot be served: OSError" in http.get("/health").json()["failed_deployment"]
        assert service.settings.model == str(old)


def test_a_former_model_whose_files_are_gone_is_fetched_again_where_the_new_one_cannot_be_loaded(tmp_path, monkeypatch):
    old, bad = save_model(tmp_path / "old"), save_model(tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    fetched = []

    def fetch(settings):  # to a new directory, as MLflow does, and without checks
        fetched.append(tmp_path / str(len(fetched)))
        return {"model": Path(shutil.copytree(settings.model, fetched[-1]))}

    monkeypatch.setattr("serve.service.fetch_models", fetch)
    with (
        endpoint(old, max_model_len=40, load_after_drain=True) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        before = complete(http)["choices"]
        shutil.rmtree(fetched[0])
        asyncio.run(service.configure(service.settings.model_copy(update={"model": str(bad)})))
        assert complete(http)["choices"] == before
        assert f"model={bad} cannot be served: OSError" in http.get("/health").json()["failed_deployment"]
        assert service._folders == {"model": fetched[2]}


def test_a_model_that_does_not_pass_the_checks_before_a_drain_causes_none(tmp_path):
    old, bad = save_model(tmp_path / "old"), save_model(tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    with (
        endpoint(old, max_model_len=40, load_after_drain=True) as (url, service),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        former = dict(service.models)
        asyncio.run(service.configure(service.settings.model_copy(update={"model": str(bad)})))
        assert service.models == former
        assert f"model={bad} cannot be served: FileNotFoundError" in http.get("/health").json()["failed_deployment"]


def test_requests_that_wait_for_a_change_of_models_are_as_many_as_the_new_engine_takes(tmp_path):
    save_model(tmp_path / "old")
    save_model(tmp_path / "new")
    with (
        endpoint(tmp_path / "old", max_num_seqs=1, max_model_len=56, max_waiting=2, load_after_drain=True) as (
            url,
            service,
        ),
        httpx.Client(base_url=url, timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):
        steps = HeldSteps(service.models["tiny"].engine)
        body = {"prompt": "abc", "max_tokens": 12, "ignore_eos": True}
        running = pool.submit(http.post, "/v1/completions", json=body)
        steps.release(1)
        wait_until(lambda: steps.done == 1, "the request never began")
        swapped = service.settings.model_copy(update={"model": str(tmp_path / "new")})
        change = pool.submit(lambda: asyncio.run(service.configure(swapped)))
        wait_until(lambda: not service.models, "the drain never began")
        waiting = [pool.submit(http.post, "/v1/completions", json={**body, "n": n}) for n in (1, 2)]
        wait_until(lambda: service._held == 3, "the requests never waited")
        refused = http.post("/v1/completions", json=body)
        waiting.append(pool.submit(http.post, "/tokenize", json={"prompt": "a"}))
        steps.release(1000)
        change.result(timeout=60)
        answers = [each.result(timeout=60) for each in (running, *waiting)]
        assert metrics(http)['kforcing_requests_rejected_total{model="tiny",replica="test"}'] == 1
    assert [answer.status_code for answer in answers] == [200] * 4
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["code"] == "overloaded"


def test_requests_that_waited_for_a_change_of_models_take_their_places_in_order_before_newer_ones(
    tmp_path, monkeypatch
):
    settings = Settings(model=str(save_model(tmp_path / "old")), name="tiny", max_model_len=56, load_after_drain=True)
    new = settings.model_copy(update={"model": str(save_model(tmp_path / "new"))})
    loading, permit = threading.Event(), threading.Event()

    def load(*given):
        loading.set()
        assert permit.wait(timeout=60)
        return load_models(*given)

    async def scenario(service):
        await service.configure(settings)
        monkeypatch.setattr("serve.service.load_models", load)
        change = asyncio.create_task(service.configure(new))
        assert await asyncio.to_thread(loading.wait, 60)

        def ask():
            return asyncio.create_task(service.accept(CompletionRequest(prompt="abc", max_tokens=4)))

        held = [ask() for _ in range(4)]
        await asyncio.sleep(0)
        assert service._held == 4
        held.pop(1).cancel()
        permit.set()
        await change
        accepted = [await each for each in [*held, ask()]]
        assert service._held == 0
        for model in service.models.values():
            model.async_engine.close()
        return [next(iter(each._open)).submitted for each in accepted]

    service = Service("test")
    try:
        came = asyncio.run(scenario(service))
    finally:
        service.thread.close()
    assert came == sorted(came)


@pytest.mark.parametrize("load_after_drain", [False, True])
def test_a_reader_who_is_slow_keeps_no_weights_of_a_replaced_model(tmp_path, load_after_drain):
    old = make_sequential(make_backbone())
    settings = Settings(model=str(save_model(tmp_path / "old", old)), acceptance="fixed", max_model_len=56)
    settings.load_after_drain = load_after_drain
    new = settings.model_copy(update={"model": str(save_model(tmp_path / "new"))})

    async def scenario(service):
        await service.configure(settings)
        engines = [weakref.ref(model.engine) for model in service.models.values()]
        slow = await service.accept(CompletionRequest(prompt="abc", max_tokens=40, seed=2, ignore_eos=True))
        text = "".join(delta.text for delta in await slow.read())
        await service.configure(new)
        wait_until(
            lambda: gc.collect() >= 0 and not any(engine() for engine in engines), "the weights were never freed"
        )
        while deltas := await slow.read():
            text += "".join(delta.text for delta in deltas)
        for model in service.models.values():
            model.async_engine.close()
        return text

    service = Service("test")
    try:
        assert asyncio.run(scenario(service)) == text_of(expected(old, n=40, seed=2, stop=frozenset()))
    finally:
        service.thread.close()
