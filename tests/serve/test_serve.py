"""The endpoint under real Ray Serve: clients from PyPI, redeployment, scaling, and the failure of a replica."""

import asyncio
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import openai
import pytest
import ray
from ray import serve

from kforcing.reference import decode
from serve.app import build
from serve.metrics_hub import MetricsHub
from serve.processes import replicas
from tests.endpoint import EOS, ids_of, save_model, text_of
from tests.models import make_backbone, make_sequential
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def cluster():
    folder = tempfile.mkdtemp(prefix="kf", dir="/tmp" if os.path.isdir("/tmp") else None)  # short: sockets lie below it
    ray.shutdown()  # the cluster of other tests in this process
    ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})
    yield
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("serve") / "tiny", chat=True)


def application(folder, **settings):
    return build(
        {"model": str(folder), "name": "tiny", "acceptance": "fixed"}
        | {"max_num_seqs": 8, "max_model_len": 56, "drain_s": 30, **settings}
    )


def deploy(folder, **settings):
    serve.run(application(folder, **settings))


def complete(**body):
    answer = httpx.post(
        f"{URL}/v1/completions", json={"prompt": "abc", "seed": 1, "max_tokens": 12, **body}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_real_clients_get_the_reference_text_from_one_replica(cluster, folder, tmp_path):
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
    assert httpx.get(URL).text == (ROOT / "serve" / "page" / "index.html").read_text()
    assert httpx.get(f"{URL}/page/page.js").headers["content-type"].startswith("text/javascript")
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


def test_a_redeployment_changes_the_weights_and_drops_no_request(cluster, folder, tmp_path):
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
        wait_until(lambda: len(answers) >= 8, "the old deployment answered too few requests", 60)
        deploy(tmp_path / "new")
        before = len(answers)
        wait_until(lambda: len(answers) >= before + 8, "the new deployment answered too few requests", 60)
        stop = True
    assert {a.status_code for a in answers} == {200}
    texts = [a.json()["choices"][0]["text"] for a in answers]
    of_old, of_new = (
        text_of(decode(m, ids_of("abc"), 40, seed=1, k=4)) for m in (make_sequential(make_backbone()), new)
    )
    assert set(texts) == {of_old, of_new}
    assert complete(max_tokens=40, ignore_eos=True) == of_new
    with pytest.raises(ValueError, match="k=9"):
        deploy(folder, k=9)
    bad = application(save_model(tmp_path / "bad"))
    (tmp_path / "bad" / "model.safetensors").unlink()  # what `build` has checked is gone when the replica loads it
    serve.run(bad)
    assert f"model={tmp_path / 'bad'} cannot be served" in httpx.get(f"{URL}/health").json()["failed_deployment"]
    assert complete(max_tokens=40, ignore_eos=True) == of_new


def requests_are_running():
    lines = httpx.get(f"{URL}/metrics").text.splitlines()
    return any(float(x.split()[-1]) > 0 for x in lines if x.startswith("kforcing_num_requests_running{"))


def test_scaling_down_lets_running_requests_finish(cluster, folder):
    deploy(folder, min_replicas=2, max_replicas=2, max_waiting=500)
    body = {"prompt": "abc", "seed": 1, "max_tokens": 53, "ignore_eos": True, "n": 60}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(httpx.post, f"{URL}/v1/completions", json=body, timeout=120) for _ in range(4)]
        wait_until(requests_are_running, "no request began", 60)
        deploy(folder, max_waiting=500)
        assert [r.result().status_code for r in running] == [200] * 4


def test_many_waiting_requests_start_another_replica(cluster, folder):
    deploy(folder, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=1, max_waiting=500)
    body = {"prompt": "abc", "max_tokens": 53, "ignore_eos": True, "n": 20}
    stop = False

    def keep_asking():
        with httpx.Client(timeout=60) as client:
            while not stop:
                assert client.post(f"{URL}/v1/completions", json=body).status_code == 200

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(keep_asking) for _ in range(8)]
        try:
            wait_until(lambda: len(replicas()) == 2, "no second replica was started", 60)
        finally:
            stop = True
        for future in running:
            future.result()


def replicas_in_metrics():
    text = httpx.get(f"{URL}/metrics").text
    return {part.split('"')[1] for part in text.split("replica=")[1:] if part}


def test_a_killed_replica_is_replaced_while_the_others_keep_answering(cluster, folder):
    deploy(folder, min_replicas=2, max_replicas=2)
    wait_until(lambda: len(replicas_in_metrics()) == 2, "/metrics does not show both replicas", 60)
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
        wait_until(lambda: len(answers) >= 8, "too few requests were answered", 60)
        os.kill(victim, signal.SIGKILL)
    codes = [a.status_code if isinstance(a, httpx.Response) else type(a).__name__ for a in answers]
    assert codes.count(200) > 100
    assert set(codes) <= {200, 500, 502, 503}, "requests of the killed replica fail with a status"
    wait_until(lambda: victim not in replicas() and len(replicas()) == 2, "the replica was not replaced", 60)
    assert complete()


def test_200_concurrent_streams_end_with_a_whole_answer_or_a_refusal(cluster, folder):
    deploy(folder, max_waiting=100)

    async def one(client, seed):
        body = {"prompt": "abc", "max_tokens": 24, "seed": seed, "stream": True, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return answer.status_code, lines

    async def everybody():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=URL, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(200)))

    answers = asyncio.run(everybody())
    assert {code for code, _ in answers} <= {200, 429, 503}
    assert all(lines[-1] == "data: [DONE]" for code, lines in answers if code == 200)
    assert sum(code == 200 for code, _ in answers) >= 100


def test_the_actor_that_gathers_metrics_ends_when_no_replica_is_left(cluster):
    hub = ray.remote(num_cpus=0)(MetricsHub).options(name="hub-of-the-test", lifetime="detached").remote(1.0)
    assert ray.get(hub.put.remote("replica", "text", None)) == ["text"]
    wait_until(lambda: "hub-of-the-test" not in ray.util.list_named_actors(), "the actor never ended", 60)
