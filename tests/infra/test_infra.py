"""What operators apply fits the code: every command line parses, and the pools of the job hold its run."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.runs.cluster import preflight, work_of_run
from serve.app import build
from serve.settings import read_settings
from tests.infra.manifests import INFRA, ROOT

pytestmark = pytest.mark.cluster


@pytest.fixture
def job():
    return yaml.safe_load((INFRA / "rayjob.yaml").read_text())["spec"]


def config_of(job):
    words = job["entrypoint"].split()
    assert words[:4] == ["python", "pipelines/distill.py", "--recipe", "hf"]
    return apply(recipe("hf"), {}, words[4:])


def test_the_jobs_command_line_parses(job):
    config = config_of(job)
    assert config.data.source == "self"
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
        labels |= {f"{key}={value}" for key, value in group["labels"].items()}
    preflight(work_of_run(config), have, "the job's cluster")
    assert labels == {config.train.label, config.self_text.label}


def test_makefile_has_the_promised_commands():
    text = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in text for target in ("distill", "test", "setup", "check"))


def test_the_serve_config_builds():
    config = yaml.safe_load((INFRA / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == "serve.app:build"
    settings = read_settings(application["args"])
    assert settings.max_replicas == 8
    build(application["args"] | {"model": "models:/kforcing-hf/1"})  # an alias would be looked up
