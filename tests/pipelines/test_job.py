"""`ray job submit` against a cluster that is already up: submit, stop in the middle, submit again."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from tests.pipeline_runs import ROOT, environment
from tests.ranks import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster(tmp_path):
    """A head node on its own ports, with token authentication as new clusters have it."""
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
    env["PATH"] = f"{RAY.parent}{os.pathsep}{env['PATH']}"  # jobs run the cluster's `python`
    short = tempfile.mkdtemp(prefix="r")  # Ray's socket paths must stay short
    dashboard = free_port()
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={short}", "--disable-usage-stats", "--num-cpus=2",
        ],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        ask = partial(subprocess.run, [RAY, "job", "list"], env=env, capture_output=True, timeout=60)
        wait_until(lambda: ask().returncode == 0, "the cluster did not come up", 300, pause=1)
        yield env
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def submit(env, name, run, *flags):
    words = ["--recipe", "smoke", "student.k=1", "teacher.train.steps=400", f"output_dir={run}"]
    line = [RAY, "job", "submit", f"--submission-id={name}", "--working-dir", ".", *flags]
    return subprocess.run(
        [*line, "--", "python", "pipelines/distill.py", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def logs(env, name):
    return subprocess.run([RAY, "job", "logs", name], env=env, capture_output=True, text=True, timeout=60).stdout


def test_a_job_imports_the_project_from_its_working_directory(cluster):
    code = "import pipelines; print('from', pipelines.__file__)"
    line = [RAY, "job", "submit", "--submission-id=where", "--working-dir", ".", "--", "python", "-c", code]
    done = subprocess.run(line, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=120)
    assert re.search(r"from \S+/working_dir_files/\S+/pipelines/__init__.py", done.stdout), done.stdout + done.stderr


OWN = """
import json, os, sys
from pathlib import Path
from pipelines.runs.cluster import connected
with connected(Path("/shared"), {}):
    import ray
    names = ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "MINE")
    in_a_task = ray.get(ray.remote(num_cpus=0)(lambda: [os.environ.get(name) for name in names]).remote())
    print("SAW", json.dumps([sys.argv[1:], in_a_task]))
"""


def test_a_jobs_own_environment_wins_and_its_words_arrive_as_they_were_written(cluster):
    """TOKENIZERS_PARALLELISM is one of the variables that a run sets itself, and the job sets it otherwise."""
    words = ["data.source=/a b/*.jsonl", 'recipe="x"', "it's", "$HOME", "stages.k4={train: {steps: 3}}", "50%;&|"]
    own = json.dumps({"env_vars": {"TOKENIZERS_PARALLELISM": "true", "MINE": "a b'c"}})
    flags = ["--submission-id=own", "--working-dir", ".", f"--runtime-env-json={own}"]
    line = [RAY, "job", "submit", *flags, "--", "python", "-c", OWN, *words]
    done = subprocess.run(line, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300)
    found = re.search(r"^SAW (.*)$", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    assert json.loads(found[1]) == [words, ["true", "error", "a b'c"]]


def test_a_stopped_job_is_continued_by_the_next_submit(cluster, tmp_path):
    run = tmp_path / "runs" / "job"
    refused = "the cluster takes no jobs"  # while its agent starts, it says that one should try again
    wait_until(lambda: submit(cluster, "first", run, "--no-wait").returncode == 0, refused, 300, pause=1)

    def past_the_first_checkpoint():
        text = logs(cluster, "first")
        assert "Traceback" not in text
        return re.search(r"teacher +step (1[2-9]|[2-9]\d|\d{3})/400", text)

    wait_until(past_the_first_checkpoint, lambda: logs(cluster, "first"), 900, pause=0.5)
    stopped = subprocess.run([RAY, "job", "stop", "first"], env=cluster, capture_output=True, text=True, timeout=120)
    assert "was stopped" in stopped.stdout + stopped.stderr
    done = submit(cluster, "second", run)
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-4000:]
    resumed = re.search(r"teacher +step (\d+)/400", out)  # none when training ended before the stop took hold
    assert resumed is None or int(resumed[1]) > 8
    assert (run / "report.md").is_file()
    assert (run / "k1" / "manifest.json").is_file()
