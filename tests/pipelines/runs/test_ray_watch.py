"""A real Ray whose own processes die."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.pipeline_runs import environment, processes_below
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
CONNECTED = """
import time
from pathlib import Path
from pipelines.log import show_progress
from pipelines.runs.cluster import connected
show_progress()
with connected(Path("run"), {}):
    print("connected", flush=True)
    time.sleep(300)
"""


def test_a_run_says_that_ray_has_died_before_ray_ends_it(tmp_path):
    log = tmp_path / "out.txt"
    with open(log, "w") as out:
        run = subprocess.Popen(
            [sys.executable, "-c", CONNECTED], stdout=out, stderr=out, cwd=tmp_path, env=environment()
        )
    try:
        wait_until(lambda: "connected" in log.read_text() or run.poll() is not None, log.read_text, 300, pause=0.2)
        for title, name in (("gcs/gcs_server", "GCS of the cluster"), ("raylet/raylet", "raylet of this node")):
            (pid,) = processes_below(run.pid, title)
            os.kill(pid, signal.SIGKILL)
            line = rf"warning  the {name} \(.*:\d+\) does not answer\. If it is dead, Ray ends this run"
            wait_until(lambda line=line: re.search(line, log.read_text()), log.read_text, 60, pause=0.2)
        assert len(re.findall("does not answer", log.read_text())) == 2
    finally:
        for pid in (run.pid, *processes_below(run.pid, "")):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait(timeout=60)
