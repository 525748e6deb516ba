"""Trackers, and MLflow servers that tests start and kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import urllib.request

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.saved import save_config
from pipelines.config.stages import resolve_run
from pipelines.tracking.tracker import Tracker
from tests.waiting import wait_until

PARAMS = {"k": 2, "train": {"lr": 0.002}}
RECORD = {
    "stage": "k2",
    "step": 20,
    "steps": 100,
    "loss": 2.5,
    "nll": [2.0, 3.0],
    "match": [0.5, 0.25],
    "block_match": 0.125,
    "tokens": 64,
    "seconds": 2.0,
    "tokens_per_s": 1234.5,
    "tokens_seen": 1280,
    "data_wait": 0.034,
    "eta_s": 125.0,
    "train_rss_mb": 300.0,
}


class Mailbox:
    """Stands where the Relay actor does; what tracking does with records is the subject here."""

    def __init__(self, records):
        self.records = records

    def __call__(self) -> list:
        taken, self.records = self.records, []
        return taken


def start_server(tmp_path, port):
    """The process of a server that answers; a second one on the same folder continues the first one's store."""
    line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/artifacts",
    ]
    process = subprocess.Popen(
        [*line, *store],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # it would start seven more processes
    )
    try:
        wait_until(lambda: answers(port), "the MLflow server did not come up", 300, pause=0.5)
    except BaseException:
        kill(process)
        raise
    return process


def answers(port):
    """Whether the server is up."""
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def kill(process):
    """The server and its workers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def tracker_for(tmp_path, uri, records=()):
    config = apply(recipe("smoke"), {}, [f"output_dir={tmp_path}/runs/a", f"tracking.uri={uri}"])
    config.root.mkdir(parents=True, exist_ok=True)
    save_config(config)
    return config, Tracker(resolve_run(config), dataclasses.asdict(config), Mailbox(list(records)))


def log_lines(config):
    return [json.loads(line) for line in (config.root / "log.jsonl").read_text().splitlines()]
