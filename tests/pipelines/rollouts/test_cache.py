"""Cached rollouts are written once, and a shard that was damaged is written again."""

import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve
from pipelines.rollouts.cache import cache_rollouts
from pipelines.runs.stages import Stage
from pipelines.training.job import stage_job

pytestmark = pytest.mark.cluster
WORDS = ["student.k=2", "train.steps=6", "train.batch=4", "train.micro_batch=2", "rollout.windows=4"]
WORDS += ["rollout.cache=true", "rollout.cache_epochs=2"]


@pytest.fixture
def cached(tmp_path):
    """A function that caches the rollouts of a tiny stage, and returns their folder."""
    with tarfile.open(Path(__file__).parents[2] / "data" / "finished_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run, store = tmp_path / "runs" / "tiny", str(next((tmp_path / "runs" / "data").glob("*/train")))
    spec = resolve(apply(recipe("smoke"), {}, WORDS))[-1]
    stage = Stage("k2", "f00", tmp_path / "k2")
    stage.folder.mkdir()
    job = stage_job(spec, str(stage.folder), store, str(run / "teacher"), str(run / "k1")).rollout_job
    return lambda: Path(cache_rollouts(stage, store, spec.seed, spec.train, spec.rollout, job))


def test_a_damaged_shard_is_named_and_written_again_alone(ray_here, cached, caplog):
    folder = cached()
    files = sorted(folder.glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [4, 4, 4]
    tables, times = [pq.read_table(file) for file in files], [file.stat().st_mtime_ns for file in files]
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:50]), b""):
        caplog.clear()
        files[1].write_bytes(damaged)
        assert cached() == folder
        assert pq.read_table(files[1]).equals(tables[1])
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert line == f"{files[1]} is missing or does not hold what was written to it; it is made again"
    (folder / "manifest.json").write_text("{")
    assert cached() == folder
    assert f"{folder}/manifest.json is empty or cut" in caplog.text
    assert [file.stat().st_mtime_ns for file in (files[0], files[2])] == [times[0], times[2]]
