"""`ray job submit` against a cluster that is already up: submit, stop in the middle, submit again."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.ranks import free_port

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster(tmp_path):
    """A head node on its own ports, with token authentication as new clusters have it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    env = {**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "HF_HUB_OFFLINE": "1"}
    env["PATH"] = f"{RAY.parent}{os.pathsep}{env['PATH']}"  # jobs run the cluster's `python`
    short = tempfile.mkdtemp(prefix="r")  # Ray's socket paths must stay short
    dashboard = free_port()
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
            f"--temp-dir={short}", "--disable-usage-stats", "--num-cpus=2",
        ],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 90
    while subprocess.run([RAY, "job", "list"], env=env, capture_output=True).returncode:
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(1)
    yield env
    os.killpg(head.pid, 15)
    head.wait(timeout=60)


def submit(env, name, run, *more):
    words = ["--recipe", "smoke", "student.k=2", "train.steps=400", f"output_dir={run}", *more]
    line = [RAY, "job", "submit", f"--submission-id={name}", "--working-dir", ".", *_flags(more)]
    return subprocess.run(
        [*line, "--", "python", "pipelines/distill.py", *[w for w in words if not w.startswith("--no")]],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def _flags(more):
    return [w for w in more if w.startswith("--no")]


def logs(env, name):
    return subprocess.run([RAY, "job", "logs", name], env=env, capture_output=True, text=True).stdout


def test_a_stopped_job_is_continued_by_the_next_submit(cluster, tmp_path):
    run = tmp_path / "runs" / "job"
    assert submit(cluster, "first", run, "--no-wait").returncode == 0
    deadline = time.monotonic() + 300
    while not re.search(r"k2 +step (1[2-9]|[2-9]\d|\d{3})/400", logs(cluster, "first")):  # past the first checkpoint
        assert time.monotonic() < deadline, logs(cluster, "first")
        assert "Traceback" not in logs(cluster, "first")
        time.sleep(0.5)
    stopped = subprocess.run([RAY, "job", "stop", "first"], env=cluster, capture_output=True, text=True, timeout=120)
    assert "was stopped" in stopped.stdout + stopped.stderr
    done = submit(cluster, "second", run)
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-4000:]
    assert "teacher  finished before, skipped" in out
    resumed = re.search(r"k2 +step (\d+)/400", out)  # none when training ended before the stop took hold
    assert resumed is None or int(resumed[1]) > 8
    assert (run / "report.md").is_file()
    assert (run / "k2" / "manifest.json").is_file()
