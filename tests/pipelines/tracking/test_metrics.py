"""What a run reports is on the metrics port of its Ray node, where Prometheus scrapes it."""

import dataclasses
import os
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kforcing import Design
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve_run
from pipelines.data.rows import token_rows, with_place
from pipelines.rollouts.actor import RolloutActor
from pipelines.rollouts.plan import RolloutJob
from pipelines.runs.cluster import init_ray
from pipelines.tracking.metrics import COUNTERS, GAUGES, RunMetrics, count, set_gauge
from pipelines.tracking.tracker import Tracker
from tests.models import VOCAB, make_backbone
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
RECORD = {
    "stage": "k2",
    "step": 20,
    "steps": 100,
    "loss": 2.5,
    "match": [0.5, 0.25],
    "seconds": 2.0,
    "tokens_per_s": 1000.0,
    "tokens_seen": 1280,
    "rows_seen": 160,
    "saved_at": 1.7e9,
    "data_wait": 0.25,
    "eta_s": 125.0,
}


@pytest.fixture(scope="module")
def scrape():
    """A cluster that reports every second, and a function: what Prometheus reads, by name and by run and stage."""
    import ray

    report = {"metrics_report_interval_ms": 1000}
    ray.shutdown()  # the cluster of other tests in this process
    init_ray(address="local", include_dashboard=False, log_to_driver=False, num_cpus=1, _system_config=report)
    (node,) = ray.nodes()

    def read():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {(s.name, s.labels.get("run"), s.labels.get("stage")): s.value for s in samples}

    yield read
    ray.shutdown()


def appears(scrape, name, run, stage, value):
    key, found = (f"ray_{name}", run, stage), {}

    def there():
        found.update(scrape())
        return found.get(key) == pytest.approx(value)

    wait_until(there, lambda: f"{key} is {found.get(key)}, expected {value}", 120, pause=0.5)


def tracker_of(folder, records):
    config = apply(recipe("smoke"), {}, [f"output_dir={folder}", "tracking.uri=off"])
    config.root.mkdir(parents=True)
    return Tracker(resolve_run(config), dataclasses.asdict(config), lambda: [records.pop()] if records else [])


def test_a_stage_shows_its_records_while_it_runs_and_that_it_has_ended(scrape, tmp_path):
    tracker = tracker_of(tmp_path / "mine", [RECORD])
    with tracker.stage("k2", "f00", {}):
        for name, value in {
            "stage_running": 1,
            "train_step": 20,
            "train_steps": 100,
            "train_loss": 2.5,
            "train_rows": 160,
            "checkpoint_timestamp_seconds": 1.7e9,
            "train_tokens_total": 2000,
            "train_seconds_total": 2,
            "train_wait_seconds_total": 0.5,
        }.items():
            appears(scrape, f"kforcing_{name}", "mine", "k2", value)
        for _ in range(8):  # Ray would forget a gauge within two seconds here
            time.sleep(0.5)
            assert scrape()["ray_kforcing_train_step", "mine", "k2"] == 20
    appears(scrape, "kforcing_stage_running", "mine", "k2", 0)


def test_a_record_that_comes_after_the_end_of_its_stage_is_counted(scrape):
    metrics = RunMetrics("late")
    metrics.started("k2")
    metrics.ended("k2")
    metrics.publish(RECORD)
    appears(scrape, "kforcing_train_tokens_total", "late", "k2", 2000)
    assert ("ray_kforcing_train_step", "late", "k2") not in scrape()


def test_a_rollout_actor_shows_how_far_it_is(scrape, tmp_path):
    make_backbone().save_pretrained(tmp_path)
    actor = RolloutActor(RolloutJob(str(tmp_path), True, 2, 5, 0, "k2", Design(), None, None, 1, run="other"))
    tokens, numbers = np.random.default_rng(0).integers(0, VOCAB, (4, 12)), np.arange(4)
    actor(with_place(token_rows(numbers, numbers, tokens), numbers + 40, np.zeros(4, np.int64)))
    appears(scrape, "kforcing_rollout_rows", "other", "k2", 44)


def test_a_divergence_is_counted_although_its_driver_ends_at_once(scrape):
    import ray

    code = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
from pipelines.tracking.metrics import count
count("kforcing_diverged_total", 1, "broken", "k4")
ray.shutdown()
"""
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    appears(scrape, "kforcing_diverged_total", "broken", "k4", 1)


def test_every_metric_appears_with_ray_before_its_name(scrape):
    for name in GAUGES:
        set_gauge(name, 1.5, "all", "k1")
    for name in COUNTERS:
        count(name, 1.5, "all", "k1")
    for name in (*GAUGES, *COUNTERS):
        appears(scrape, name, "all", "k1", 1.5)
