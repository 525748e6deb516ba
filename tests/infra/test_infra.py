"""What operators apply must fit the code: every command line parses, every pool the job asks for exists."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.runs.cluster import preflight, work_of_run
from serve.app import build
from serve.metrics import EngineMetrics, Metrics
from serve.settings import read_settings

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


@pytest.fixture
def job():
    return yaml.safe_load((ROOT / "infra" / "rayjob.yaml").read_text())["spec"]


def config_of(job):
    words = job["entrypoint"].split()
    assert words[:4] == ["python", "pipelines/distill.py", "--recipe", "hf"]
    return apply(recipe("hf"), {}, words[4:])


def test_the_jobs_command_line_parses(job):
    config = config_of(job)
    assert config.data.source == "hf:Skylion007/openwebtext"
    assert config.root == Path("/shared/runs/smollm2")


def test_the_jobs_pools_hold_the_run(job):
    config = config_of(job)
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    have = {"CPU": 4.0, "GPU": 0.0}
    labels = set()
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        have["CPU"] += group["replicas"] * float(limits["cpu"])
        have["GPU"] += group["replicas"] * float(limits["nvidia.com/gpu"])
        labels.add(group["rayStartParams"]["labels"])
    preflight(work_of_run(config), have, "the job's cluster")
    assert labels == {config.train.label, config.rollout.label}


def test_the_image_copies_what_exists():
    copied = [line.split()[1:-1] for line in (ROOT / "infra" / "Dockerfile").read_text().splitlines() if "COPY" in line]
    for source in itertools.chain.from_iterable(copied):
        assert (ROOT / source).exists(), source


def test_makefile_has_the_promised_commands():
    text = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in text for target in ("distill", "test", "setup", "check"))


def exported():
    """Names of the samples of /metrics."""
    text = Metrics()
    own = EngineMetrics(text, "m", "r")
    own.queued(0.1)
    own.delivered(0.1)
    own.first_token(0.1)
    own.finished("stop", 1.0, 0.5, 3, 4)
    lines = text.text().splitlines()
    return {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}


def queries():
    """(where, PromQL) of the dashboard and the alerts."""
    for panel in json.loads((ROOT / "infra" / "grafana.json").read_text())["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for group in yaml.safe_load((ROOT / "infra" / "alerts.yaml").read_text())["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])


def test_every_metric_that_is_queried_is_exported():
    names = exported()
    asked = {name for _, query in queries() for name in re.findall(r"kforcing_\w+", query)}
    assert len(asked) > 12
    assert asked <= names, asked - names


def test_vllms_names_are_kept_behind_the_prefix():
    wanted = [
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds_bucket",
        "kv_cache_usage_perc",
    ]
    wanted += [
        "request_time_per_output_token_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "prompt_tokens_total",
    ]
    wanted += ["generation_tokens_total", "request_success_total", "tokens_per_forward", "discarded_tokens_total"]
    assert {f"kforcing_{name}" for name in wanted} <= exported()


def test_the_serve_config_builds():
    config = yaml.safe_load((ROOT / "infra" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "serve.app:build"
    settings = read_settings(application["args"])
    assert settings.max_replicas == 8
    build(application["args"] | {"model": "models:/kforcing-hf/1"})  # an alias would be looked up
