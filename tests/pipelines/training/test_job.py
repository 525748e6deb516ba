"""How the job of a student stage follows from its spec, and that it trains in one process."""

import re
import tarfile
from pathlib import Path

import pytest

from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.stages import resolve, stage_spec
from pipelines.data.token_store import TokenStore
from pipelines.runs.stages import StageError
from pipelines.training.initial_model import Grown, Wrapped
from pipelines.training.job import stage_job
from pipelines.training.single_process import LocalStudent


def job(*words, previous="k1"):
    return stage_job(stage_spec(apply(recipe("smoke"), {}, words), 2), "folder", "store", "teacher", previous)


def test_a_stage_begins_with_the_student_before_it_or_with_the_teacher():
    assert job().init == Grown("k1", 2, "soft")
    assert isinstance(job(previous=None).init, Wrapped)
    assert isinstance(job("train.warm_start=teacher").init, Wrapped)


def test_targets_come_from_the_ar_teacher_or_from_the_student_before():
    rollout = job().rollout_job
    assert (rollout.teacher, rollout.ar, rollout.teacher_top_k) == ("teacher", True, 32)
    rollout = job("targets=self", "loss=hard").rollout_job
    assert (rollout.teacher, rollout.ar, rollout.teacher_top_k) == ("k1", False, None)
    assert job("targets=self", "loss=hard", previous=None).rollout_job.ar


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The stored tiny run: (folder of the run, folder of its token blocks)."""
    folder = tmp_path_factory.mktemp("finished")
    with tarfile.open(Path(__file__).parents[2] / "data" / "finished_run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "runs" / "tiny", next((folder / "runs" / "data").glob("*/train"))


def test_stages_are_trained_in_one_process_up_to_a_budget(finished, tmp_path):
    run, store = finished
    words = ["student.k=2", "train.steps=4", "rollout.windows=4", "train.batch=4", "train.micro_batch=2"]
    stages = resolve(apply(recipe("smoke"), {}, words))
    student = LocalStudent(stages, str(run / "teacher"), str(store), str(tmp_path), "test")
    assert student.stage(1, None, 0.0, None)["steps"] == 0
    flops = student.count(2, tmp_path / "k1")
    cost = student.stage(2, None, 3 * flops.total, tmp_path / "k1")
    assert cost["steps"] == 3
    assert cost["flops"] == pytest.approx(3 * flops.total)
    assert student.spent == cost["flops"]
    assert LocalStudent(stages, str(run / "teacher"), str(store), str(tmp_path), "test").stage(2, 9, None, None) == cost


def test_training_in_one_process_stops_when_it_diverges_and_says_what_it_was_fed(finished, tmp_path):
    run, store = finished
    words = ["student.k=2", "rollout.windows=4", "train.batch=4", "train.micro_batch=2", "train.warmup=0"]
    stages = resolve(apply(recipe("smoke"), {}, [*words, "train.lr=100", "train.clip=0"]))
    student = LocalStudent(stages, str(run / "teacher"), str(store), str(tmp_path), "test")
    student.stage(1, None, 0.0, None)
    with pytest.raises(
        StageError, match=r"test  k2: training diverged in step (\d+) of 4: .*rows (\d+) to (\d+) of"
    ) as error:
        student.stage(2, 4, None, tmp_path / "k1")
    step = int(re.search(r"step (\d+) of", str(error.value))[1])
    assert f"rows {4 * step - 4} to {4 * step - 1} of {store} in the order of seed 0" in str(error.value)
    assert len(TokenStore(store, 0).read(range(4 * step - 4, 4 * step))) == 4
    assert "The last good checkpoint is none" in str(error.value)
    assert not (tmp_path / "k2" / "config.json").exists()
    assert not (tmp_path / "k2.json").exists()
