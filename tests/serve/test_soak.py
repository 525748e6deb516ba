"""The mixed traffic of `serve.soak`, and that it notices what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.soak import tiny_models
from serve.soak_traffic import KINDS, Endpoint, Traffic, cases, whole_texts
from tests.endpoint import endpoint
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def run_traffic(url, expected_of=lambda texts: texts):
    """What three clients saw in 150 requests."""
    to = Endpoint(int(url.rpartition(":")[2]))
    asked = cases(12, 500, chat=True)
    expected = [expected_of(whole_texts(to, case)[1]) for case in asked]
    traffic = Traffic(to, asked, {"tiny": expected})
    threads = traffic.start(3)
    wait_until(lambda: sum(traffic.done.values()) >= 150, "too few requests", seconds=120)
    traffic.stopping.set()
    for thread in threads:
        thread.join()
    return traffic


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tiny_models(tmp_path_factory.mktemp("soak"))[0]
    with endpoint(folder, max_num_seqs=4, max_model_len=256) as (url, _):
        yield url


def test_traffic_of_all_kinds_finds_no_problem_in_an_endpoint_without_one(url):
    traffic = run_traffic(url)
    assert traffic.problems == []
    assert set(traffic.done) == set(KINDS)
    assert {len(texts) for texts in traffic.expected["tiny"]} >= {1, 3}
    assert {case.path for case in traffic.cases} == {"/v1/completions", "/v1/chat/completions"}
    assert traffic.answered_by["tiny"] > 40


def test_a_text_that_differs_from_the_request_alone_is_a_problem(url):
    traffic = run_traffic(url, expected_of=lambda texts: [*texts[:-1], "another"])
    assert len(traffic.problems) == traffic.answered_by["tiny"]
    assert "and alone" in traffic.problems[0]


@pytest.mark.slow
def test_mixed_traffic_with_redeployments_and_a_killed_replica_ends_without_a_problem(tmp_path):
    command = [sys.executable, "-m", "serve.soak", "--minutes", "3", "--port", "8017"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["problems"] == 0
    assert record["deployments"] == {"good": 6, "refused": 2, "failed": 3, "killed": 1}
