"""Fixtures for all tests, and the tiers: see the markers in `pyproject.toml` and the targets in the Makefile.

This module imports no library at its top, because every process of pytest-xdist would wait for it.
"""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # threads cost more than they bring on models this small
ALL_CLUSTER = "\npytestmark = pytest.mark.cluster\n"


def pytest_ignore_collect(collection_path, config):
    """The fast tier does not import files whose tests are all of the cluster tier: their libraries take seconds."""
    if collection_path.suffix == ".py" and "not cluster" in config.option.markexpr:
        return ALL_CLUSTER in collection_path.read_text() or None
    return None


@pytest.fixture(scope="module")
def ray_here():
    """A Ray cluster inside this process."""
    import ray

    from pipelines.runs.cluster import init_ray

    init_ray(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def backbone(request):
    from tests.models import make_backbone

    return make_backbone(request.param)


@pytest.fixture
def student():
    from kforcing import Design, NoiseConfig, PushForwardLM
    from tests.models import make_backbone

    return PushForwardLM.from_backbone(make_backbone(), k=4, design=Design(noise=NoiseConfig(0.25, 32.0))).eval()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One undisturbed smoke run, started from a folder that is not the project's: (run directory, its output).

    Parallel workers share it: the first makes it while the others wait. Tests only read it, and change copies of it.
    """
    from filelock import FileLock

    from tests.pipeline_runs import distill

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if parallel else base) / "shared-smoke"
    output = folder / "output.txt"
    with FileLock(f"{folder}.lock", timeout=2100):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            done = distill("--recipe", "smoke", "output_dir=runs/smoke", cwd=folder)
            output.write_text(done.stdout + done.stderr)
    return folder / "runs" / "smoke", output.read_text()
