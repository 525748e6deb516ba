"""Fixtures for all tests, and the tiers: see the markers in `pyproject.toml` and the targets in the Makefile.

This module imports no library at its top, because every process of pytest-xdist would wait for it.
"""

import os
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # threads cost more than they bring on models this small
ALL_CLUSTER = "\npytestmark = pytest.mark.cluster\n"
LONGEST = ("test_distill.py", "test_serve.py", "test_tokenise.py", "test_job.py", "test_evaluation.py")


def pytest_ignore_collect(collection_path, config):
    """The fast tier does not import files whose tests are all of the cluster tier: their libraries take seconds."""
    if collection_path.suffix == ".py" and "not cluster" in config.option.markexpr:
        return ALL_CLUSTER in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(items):
    """Files of minutes come first, so that no worker of pytest-xdist begins one when the other has nothing left to do."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_sessionfinish():
    """End the cluster that `ray_here` has started."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def ray_here():
    """A Ray cluster inside this process, which stays for the next tests: its processes have imported what they need."""
    import ray

    from pipelines.runs.cluster import init_ray

    if not ray.is_initialized():
        init_ray(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def backbone(request):
    from tests.models import make_backbone

    return make_backbone(request.param)


@pytest.fixture
def student():
    from kforcing import Design, NoiseConfig, PushForwardLM
    from tests.models import make_backbone

    return PushForwardLM.from_backbone(make_backbone(), k=4, design=Design(noise=NoiseConfig(0.25, 32.0))).eval()


@pytest.fixture(scope="module")
def s3_server():
    """An S3 server on loopback: (its environment for clients, its `Faults`)."""
    from tests.object_store import object_store

    with object_store() as server:
        yield server


@pytest.fixture
def store(s3_server, tmp_path, monkeypatch):
    """An empty place on the S3 server, a cache of copies of its own, and no faults: (its URI, the server's `Faults`)."""
    import uuid

    variables, faults = s3_server
    for name, value in {**variables, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    faults.status_of = lambda number, environ: None
    return f"s3://bucket/{uuid.uuid4().hex[:8]}", faults


def made_once(tmp_path_factory, name, make):
    """(folder, what `make` of it has printed): parallel workers share it, and the first makes it while the others wait."""
    from filelock import FileLock

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if parallel else base) / name
    output = folder / "output.txt"
    with FileLock(f"{folder}.lock", timeout=2100):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            done = make(folder)
            output.write_text(done.stdout + done.stderr)
    return folder, output.read_text()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One undisturbed smoke run, started from a folder that is not the project's: (run directory, its output).

    Its stage k2 is so long that a run which is stopped in the middle of it can be compared with this one. Tests only read it,
    and change copies of it.
    """
    from tests.pipeline_runs import LONG_K2, distill

    words = ("--recipe", "smoke", LONG_K2, "output_dir=runs/smoke")
    folder, output = made_once(tmp_path_factory, "shared-smoke", lambda folder: distill(*words, cwd=folder))
    return folder / "runs" / "smoke", output


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny run with students of k = 1 and 2 that an earlier release finished, continued once: (run directory, output)."""
    from tests.pipeline_runs import FINISHED_WORDS, distill, unpack_finished_run

    def make(folder):
        unpack_finished_run(folder)
        return distill(*FINISHED_WORDS, cwd=folder)

    folder, output = made_once(tmp_path_factory, "shared-finished", make)
    return folder / "runs" / "tiny", output
