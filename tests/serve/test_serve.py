"""The endpoint under real Ray Serve: replicas, redeployment, failure, real clients."""

import asyncio
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import openai
import pytest
import ray
from ray import serve

from kforcing.reference import decode
from serve.app import build
from serve.overhead import replicas
from tests.conftest import make_backbone, make_sequential
from tests.endpoint import EOS, ids_of, save_model, text_of

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="kf", dir="/tmp" if os.path.isdir("/tmp") else None)  # short: sockets lie below it
    ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})
    yield
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("serve") / "tiny", chat=True)


def deploy(folder, **settings):
    serve.run(
        build({"model": str(folder), "name": "tiny", "max_num_seqs": 8, "max_model_len": 56, "drain_s": 30, **settings})
    )


def complete(**body):
    answer = httpx.post(
        f"{URL}/v1/completions", json={"prompt": "abc", "seed": 1, "max_tokens": 12, **body}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_real_clients_on_one_replica(cluster, folder, tmp_path):
    deploy(folder)
    student = make_sequential(make_backbone())
    expected = text_of(decode(student, ids_of("abc"), 12, seed=1, k=4, stop_ids=frozenset([EOS])))
    assert complete() == expected
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        crowd = [{"seed": s, "prompt": "abcdefghij"[: 1 + s % 9]} for s in range(32)]
        assert next(iter(pool.map(lambda body: complete(**body), [{}, *crowd]))) == expected
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], seed=1).choices
    assert httpx.get(f"{URL}/health").status_code == 200
    guidellm(folder, tmp_path)
    text = httpx.get(f"{URL}/metrics").text
    assert 'kforcing_request_success_total{finished_reason="length",model="tiny"' in text


def guidellm(folder, tmp_path):
    words = [
        *("run", "--backend", f"kind=openai_http,target={URL},model=tiny", "--profile", "kind=concurrent,streams=4"),
        *(
            "--constraint",
            "kind=max_requests,count=16",
            "--data",
            "kind=synthetic_text,prompt_tokens=16,output_tokens=16",
        ),
        *("--tokenizer", f"kind=huggingface_auto,model={folder}", "--data-loader", "kind=pytorch,samples=20"),
        *("--output", f"kind=json,path={tmp_path / 'o.json'}"),
    ]
    program = Path(sys.executable).parent / "guidellm"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([program, *words], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads((tmp_path / "o.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (16, 0)
    assert all(request["output_metrics"]["text_tokens"] == 16 for request in requests["successful"])


def test_a_redeployment_swaps_the_weights_and_drops_no_request(cluster, folder, tmp_path):
    deploy(folder)
    new = make_sequential(make_backbone(seed=3))
    save_model(tmp_path / "new", new)
    answers, stop = [], False

    def keep_asking():
        with httpx.Client(timeout=60) as client:
            while not stop:
                body = {"prompt": "abc", "seed": 1, "max_tokens": 40, "ignore_eos": True}
                answers.append(client.post(f"{URL}/v1/completions", json=body))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(keep_asking)
        time.sleep(1)
        deploy(tmp_path / "new")
        time.sleep(1)
        stop = True
    assert {a.status_code for a in answers} == {200}
    texts = [a.json()["choices"][0]["text"] for a in answers]
    of_old, of_new = (
        text_of(decode(m, ids_of("abc"), 40, seed=1, k=4)) for m in (make_sequential(make_backbone()), new)
    )
    assert set(texts) == {of_old, of_new}
    assert complete(max_tokens=40, ignore_eos=True) == of_new


def test_scaling_down_lets_requests_finish(cluster, folder):
    deploy(folder, min_replicas=2, max_replicas=2, max_waiting=500)
    body = {"prompt": "abc", "seed": 1, "max_tokens": 53, "ignore_eos": True, "n": 60}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(httpx.post, f"{URL}/v1/completions", json=body, timeout=120) for _ in range(4)]
        time.sleep(0.2)
        deploy(folder, max_waiting=500)
        assert [r.result().status_code for r in running] == [200] * 4


def test_a_long_line_brings_another_replica(cluster, folder):
    deploy(folder, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=1, max_waiting=500)
    body = {"prompt": "abc", "max_tokens": 53, "ignore_eos": True, "n": 20}
    stop = False

    def keep_asking():
        with httpx.Client(timeout=60) as client:
            while not stop:
                assert client.post(f"{URL}/v1/completions", json=body).status_code == 200

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(keep_asking) for _ in range(8)]
        deadline = time.time() + 60
        while len(replicas()) < 2 and time.time() < deadline:
            time.sleep(0.5)
        stop = True
        for future in running:
            future.result()
    assert len(replicas()) == 2


def test_a_killed_replica_harms_no_other_and_comes_back(cluster, folder):
    deploy(folder, min_replicas=2, max_replicas=2)
    seen = set()
    while len(seen) < 2:  # both have been heard of
        text = httpx.get(f"{URL}/metrics").text
        seen = {part.split('"')[1] for part in text.split("replica=")[1:] if part}
    assert len(replicas()) == 2
    victim = replicas()[0]
    answers = []

    def ask(seed):
        try:
            body = {"prompt": "abc", "seed": seed, "max_tokens": 50, "ignore_eos": True}
            answers.append(httpx.post(f"{URL}/v1/completions", json=body, timeout=60))
        except httpx.HTTPError as error:
            answers.append(error)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for seed in range(200):
            pool.submit(ask, seed)
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
    codes = [a.status_code if isinstance(a, httpx.Response) else type(a).__name__ for a in answers]
    assert codes.count(200) > 100
    assert set(codes) <= {200, 500, 502, 503}, "its own fail with a status, not silently"
    deadline = time.time() + 60
    while (victim in replicas() or len(replicas()) < 2) and time.time() < deadline:
        time.sleep(0.5)
    assert len(replicas()) == 2
    assert complete()


def test_200_streaming_clients_see_whole_answers_or_deliberate_refusals(cluster, folder):
    deploy(folder, max_waiting=100)

    async def one(client, seed):
        start = time.perf_counter()
        body = {"prompt": "abc", "max_tokens": 24, "seed": seed, "stream": True, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return answer.status_code, lines, time.perf_counter() - start

    async def everybody():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=URL, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(200)))

    answers = asyncio.run(everybody())
    assert {code for code, *_ in answers} <= {200, 429, 503}
    assert all(lines[-1] == "data: [DONE]" for code, lines, _ in answers if code == 200)
    assert sum(code == 200 for code, *_ in answers) >= 100


def test_settings_that_cannot_be_are_refused_before_anything_is_deployed(folder):
    for given, message in (
        ({}, "model: Field required"),
        ({"model": "x", "max_num_seq": 3}, "did you mean max_num_seqs"),
        ({"model": "x", "max_num_seqs": 0}, "max_num_seqs=0"),
        ({"model": "x", "min_replicas": 3, "max_replicas": 2}, "min_replicas=3"),
    ):
        with pytest.raises(ValueError, match=message):
            build(given)
