"""A stage without progress, with a real Ray Train worker that is stuck."""

import logging
import time
from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.config.schema import RolloutConfig, TrainConfig
from pipelines.data.rows import token_rows
from pipelines.data.token_store import write_manifest, write_shard
from pipelines.failures import Exit
from pipelines.runs.stages import StageError
from pipelines.training import watchdog
from pipelines.training.job import TrainJob
from pipelines.training.relay import Relay
from pipelines.training.watchdog import ending_stalls, why
from pipelines.training.worker import fit

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Stuck:
    """A model whose making does not end."""

    def build(self, chunk=0):
        time.sleep(600)


def make_store(folder):
    """Eight rows of two tokens."""
    folder.mkdir(parents=True)
    ids = np.arange(8)
    write_manifest(folder, [write_shard(folder, "shard", token_rows(ids, ids, np.stack([ids, ids], 1)))])
    return folder


def job_of(tmp_path, **train):
    folder = tmp_path / "run" / "k2"
    folder.mkdir(parents=True)
    settings = TrainConfig(batch=2, micro_batch=2, workers=1, cpus_per_worker=0.5, **train)
    store = make_store(tmp_path / "store")
    return TrainJob("k2", str(folder), str(store), 0, settings, RolloutConfig(), None, Stuck())


def test_a_stuck_worker_ends_the_stage_with_the_stacks_of_worker_and_driver(ray_here, tmp_path):
    import ray

    relay = ray.remote(num_cpus=0)(Relay).remote()
    job = job_of(tmp_path, stall_limit_s=10.0)
    with pytest.raises(StageError, match=r"no step was made for 10 s \(train.stall_limit_s\)") as error:
        fit(job, relay)
    assert error.value.exit_code == Exit.STALLED
    stacks = tmp_path / "run" / "k2" / "stacks"
    assert str(stacks) in str(error.value)
    assert "in build" in (stacks / "rank-0.txt").read_text()
    assert "in fit" in (stacks / "driver.txt").read_text()


def test_steps_keep_a_stage_alive_and_a_long_wait_is_said(ray_here, tmp_path, monkeypatch, caplog):
    import ray

    monkeypatch.setattr(watchdog, "WARN_AFTER_S", 0.5)
    monkeypatch.setattr(watchdog, "GRACE_S", 2.0)
    relay = ray.remote(num_cpus=0)(Relay).remote()
    job = job_of(tmp_path, stall_limit_s=4.0)
    with caplog.at_level(logging.WARNING), ending_stalls(job, relay):
        for _ in range(5):  # longer than the limit and its grace together
            time.sleep(1.6)
            ray.get(relay.beat.remote())
    assert "k2  no step for 0 min: " in caplog.text


def test_a_wait_for_nodes_a_start_and_a_stuck_worker_are_told_apart(ray_here, tmp_path):
    large = job_of(tmp_path / "large")
    object.__setattr__(large, "train", TrainConfig(workers=64, cpus_per_worker=1.0))
    assert why(large, begun=True) == "it needs 64 CPUs and the cluster has 2 now; it waits for nodes to join"
    small = job_of(tmp_path / "small")
    assert why(small, begun=False).startswith("its workers start, load the model or wait for their first rows")
    assert why(small, begun=True).startswith("a worker or a rollout actor is slow or stuck; `ray stack`")


def test_without_a_limit_nothing_is_watched(ray_here, tmp_path):
    with ending_stalls(job_of(tmp_path, stall_limit_s=0.0), None):
        time.sleep(0.1)
