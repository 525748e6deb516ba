"""Addresses that no cluster answers at, and what a job's own environment keeps."""

import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from pipelines.config.section import ConfigError
from pipelines.failures import Exit
from pipelines.runs import cluster
from pipelines.runs.cluster import ANSWER_S, CONNECT_S, Pool, _environment_of_workers, connected, largest_pools
from tests.pipeline_runs import environment, hear_interrupts
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("http://127.0.0.1:8265", "joins a cluster by the address of its GCS, not by a URL; give HOST:6379"),
        ("ray://head:10001", "not by a URL"),
        ("head", "is not HOST:PORT"),
        ("head:99999", "is not HOST:PORT"),
        ("127.0.0.1:9", "no cluster answers there (.*refused"),
    ],
)
def test_an_address_without_a_cluster_is_one_line_at_once(tmp_path, monkeypatch, address, problem):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")) as error, connected(tmp_path, {}):
        pass
    assert "\n" not in str(error.value)
    assert error.value.exit_code == Exit.CLUSTER


def http_server():
    """A server that knows HTTP and nothing of Ray."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1], server.shutdown


def silent_socket():
    """It takes connections and says nothing."""
    listening = socket.create_server(("127.0.0.1", 0))
    return listening.getsockname()[1], listening.close


@pytest.mark.cluster
@pytest.mark.parametrize("start", [http_server, silent_socket])
def test_an_address_where_something_else_listens_is_one_line_within_20_s(tmp_path, monkeypatch, start):
    port, stop = start()
    assert ANSWER_S + CONNECT_S < 20
    monkeypatch.setattr(cluster, "ANSWER_S", 8)  # nothing answers later, either
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError) as error, connected(tmp_path, {}):
        pass
    stop()
    assert str(error.value) == (
        f"RAY_ADDRESS=127.0.0.1:{port}: no cluster can be joined there (no answer in 8 s); "
        "give HOST:6379 of the head node, or submit the run with `ray job submit`, which sets it"
    )


def test_variables_that_a_job_sets_itself_are_left_to_it(monkeypatch):
    job = {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "true", "MINE": "1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "TOKENIZERS_PARALLELISM" not in _environment_of_workers()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert _environment_of_workers()["TOKENIZERS_PARALLELISM"] == "false"


WAITING = """
import time
from pathlib import Path
from pipelines.failures import ending_in_one_line
from pipelines.runs.cluster import connected
with ending_in_one_line(), connected(Path("run"), {}):
    import ray
    print("connected", flush=True)
    ray.get(ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote())
"""


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_says_how_to_continue(tmp_path, number):
    """Here in a temporary directory whose path is too long for the names of Ray's sockets."""
    log, long = tmp_path / "out.txt", tmp_path / ("x" * 60)
    long.mkdir()
    line, env = [sys.executable, "-c", WAITING], environment(TMPDIR=str(long))
    with open(log, "w") as out:
        run = subprocess.Popen(line, stdout=out, stderr=out, cwd=tmp_path, env=env, preexec_fn=hear_interrupts)
    wait_until(lambda: "connected" in log.read_text() or run.poll() is not None, log.read_text, 300, pause=0.2)
    run.send_signal(number)
    assert run.wait(timeout=300) == Exit.INTERRUPTED, log.read_text()
    assert log.read_text().splitlines()[-1] == "interrupted; run the same command to continue"
    assert "Traceback" not in log.read_text()


JOINING = """
import sys
from pathlib import Path
from pipelines.failures import ending_in_one_line
from pipelines.log import show_progress
from pipelines.runs.cluster import Pool, connected
show_progress()
work = {"stage k1": {"train.workers=2": Pool(2, 0.5, 0, "pool=a")}}
with ending_in_one_line(), connected(Path("run"), work, float(sys.argv[1])):
    print("runs")
"""


def waiting(line, log, folder, env):
    """A run that has said that it waits for nodes."""
    with open(log, "w") as out:
        run = subprocess.Popen([*line, "300"], stdout=out, stderr=out, cwd=folder, env=env, preexec_fn=hear_interrupts)
    wait_until(lambda: "waiting up to 300 s for nodes" in log.read_text(), log.read_text, 120, pause=0.2)
    return run


def test_an_autoscaler_is_asked_for_what_each_work_needs():
    work = {
        "stage k1": {"train": Pool(4, 1, 1, "pool=a"), "rollout": Pool(1, 2, 0, "pool=b")},
        "stage k2": {"train": Pool(2, 1, 1, "pool=a"), "rollout": Pool(3, 2, 0, "pool=b"), "light": Pool(5, 0, 0)},
    }
    assert largest_pools(work) == [Pool(4, 1, 1, "pool=a"), Pool(3, 2, 0, "pool=b")]


@pytest.mark.cluster
def test_a_run_waits_for_the_nodes_of_a_cluster_that_grows(tmp_path):
    from ray.cluster_utils import Cluster

    cluster, log = (
        Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}),
        tmp_path / "out.txt",
    )
    mode = {name: value for name, value in os.environ.items() if name == "RAY_AUTH_MODE"}  # `ray.init` sets it for good
    env, line = environment(RAY_ADDRESS=cluster.address, **mode), [sys.executable, "-c", JOINING]
    try:
        refused = subprocess.run([*line, "0"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
        problem = (
            "stage k1 needs 1 CPUs (1 for train.workers=2), the cluster has 0. Ask for fewer or for fewer CPUs each"
        )
        assert (refused.returncode, problem in refused.stderr) == (Exit.CLUSTER, True), refused.stderr
        for number in (signal.SIGTERM, signal.SIGINT):
            stopped = waiting(line, log, tmp_path, env)
            stopped.send_signal(number)
            assert stopped.wait(timeout=120) == Exit.INTERRUPTED, log.read_text()
        run = waiting(line, log, tmp_path, env)
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1, labels={"pool": "a"})
        assert run.wait(timeout=120) == 0, log.read_text()
        assert re.search(f"{re.escape(problem)}.*\nthe nodes are there after .* s\nruns\n", log.read_text()), (
            log.read_text()
        )
    finally:
        cluster.shutdown()
