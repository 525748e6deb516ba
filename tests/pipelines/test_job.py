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
import torch
from safetensors.torch import load_file

from kforcing import PushForwardLM
from tests.pipeline_runs import ROOT, copy_of, environment, report
from tests.ranks import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def cluster():
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


def submit(env, name, words, *flags):
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


def test_a_stopped_job_is_continued_by_the_next_submit_and_text_makes_a_student_of_k_in_one_stage(
    cluster, smoke, tmp_path
):
    run = copy_of(smoke[0], tmp_path / "run", "k1", "k2", "k4")
    words = ["--recipe", "smoke", f"data.cache_dir={smoke[0].parent / 'data'}", f"output_dir={run}"]
    words += ["targets=text", "loss=kl", "student.k=3", "train.sampled_tokens=40", "stages.k3.train.steps=400"]
    refused = "the cluster takes no jobs"  # while its agent starts, it says that one should try again
    wait_until(lambda: submit(cluster, "first", words, "--no-wait").returncode == 0, refused, 300, pause=1)

    def past_the_first_checkpoint():
        text = logs(cluster, "first")
        assert "Traceback" not in text
        return re.search(r"k3 +step (1[2-9]|[2-9]\d|\d{3})/400", text)

    wait_until(past_the_first_checkpoint, lambda: logs(cluster, "first"), 900, pause=0.5)
    stopped = subprocess.run([RAY, "job", "stop", "first"], env=cluster, capture_output=True, text=True, timeout=120)
    assert "was stopped" in stopped.stdout + stopped.stderr
    done = submit(cluster, "second", words)
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-4000:]
    resumed = re.search(r"k3 +step (\d+)/400", out)  # none when training ended before the stop took hold
    assert resumed is None or int(resumed[1]) > 8
    assert (run / "report.md").is_file()
    (stage,) = report(run)["stages"]
    assert (stage["name"], stage["k"], len(stage["match"])) == ("k3", 3, 3)
    assert stage["match"][0]["value"] > 0.999
    assert not (run / "k1").exists()
    student = PushForwardLM.from_pretrained(run / "k3")
    inside, teacher = student.backbone.state_dict(), load_file(run / "teacher" / "model.safetensors")
    assert all(torch.equal(inside[name], weight) for name, weight in teacher.items())
