"""What operators apply must fit the code: every command line parses, every pool the job asks for exists."""

import itertools
from pathlib import Path

import pytest
import yaml

from pipelines.cluster import preflight
from pipelines.config import apply
from pipelines.recipes import recipe

ROOT = Path(__file__).parent.parent


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
    preflight(config, have, "the job's cluster")
    assert labels == {config.train.label, config.rollout.label}


def test_the_image_copies_what_exists():
    copied = [line.split()[1:-1] for line in (ROOT / "infra" / "Dockerfile").read_text().splitlines() if "COPY" in line]
    for source in itertools.chain.from_iterable(copied):
        assert (ROOT / source).exists(), source


def test_makefile_has_the_promised_commands():
    text = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in text for target in ("distill", "test", "setup", "check"))
