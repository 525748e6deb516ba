"""Runs that earlier releases finished stay finished: stages keep their names, whatever moves in the code.

`tests/data/fingerprints.json` holds the names that the release before the packages were rearranged gave to the stages
of several configs, and `tests/data/finished_run.tar.gz` a tiny run which that release finished.
"""

import json
import tarfile
from pathlib import Path

import pytest

from pipelines.config.fingerprint import fingerprint
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.saved import load_config
from pipelines.config.stages import evaluation_fingerprint, resolve, teacher_spec
from tests.pipeline_runs import distill, report

DATA = Path(__file__).parents[1] / "data"
PINNED = json.loads((DATA / "fingerprints.json").read_text())
WORDS = [
    "--recipe",
    "smoke",
    "output_dir=runs/tiny",
    "data.max_docs=12",
    "data.docs_per_shard=4",
    "data.heldout_fraction=0.3",
    "tokenizer.vocab_size=260",
    "teacher.hidden=16",
    "teacher.layers=1",
    "teacher.heads=2",
    "teacher.mlp=16",
    "teacher.max_positions=64",
    "teacher.train.steps=4",
    "train.steps=4",
    "student.k=2",
    "eval.blocks=8",
    "eval.windows=4",
]


def names_of(config):
    """The names of all stages of a run, for a corpus whose source and tokenizer have fixed digests."""
    corpus = fingerprint(config.data, "source", {"tokenizer": "digest"})
    teacher = teacher_spec(config).fingerprint(corpus)
    names, previous = {"corpus": corpus, "teacher": teacher}, None
    for stage in resolve(config):
        previous = stage.fingerprint(corpus, teacher, previous)
        names |= {stage.name: previous, f"eval/{stage.name}": evaluation_fingerprint(previous, config.eval)}
    return names


@pytest.mark.parametrize("case", PINNED)
def test_stages_have_the_names_that_the_earlier_release_gave_them(case):
    pinned = PINNED[case]
    assert names_of(apply(recipe(pinned["recipe"]), {}, pinned["overrides"])) == pinned["names"]


@pytest.mark.cluster
def test_a_run_that_the_earlier_release_finished_is_skipped_and_reported(tmp_path):
    with tarfile.open(DATA / "finished_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "runs" / "tiny"
    before, figures = {f: f.stat().st_mtime_ns for f in run.glob("*/model.safetensors")}, report(run)["stages"]
    done = distill(*WORDS, cwd=tmp_path)
    for stage in ("teacher", "k1", "k2"):
        assert f"{stage}  finished before, skipped" in done.stdout
    assert "is up to date" in done.stdout
    assert before == {f: f.stat().st_mtime_ns for f in run.glob("*/model.safetensors")}
    again = report(run)["stages"]
    assert [{**stage, "path": ""} for stage in again] == [{**stage, "path": ""} for stage in figures]
    assert not (run / "archive").exists()
    assert load_config(run / "config.yaml").student.k == 2  # that release wrote no such file
