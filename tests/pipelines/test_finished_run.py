"""Runs that earlier releases finished stay finished: stages keep their names, whatever moves in the code.

`tests/data/fingerprints.json` holds the names that the release before the packages were rearranged gave to the stages
of several configs, and `tests/data/finished_run.tar.gz` a tiny run which that release finished.
"""

import json
from pathlib import Path

import pytest

from pipelines.config.fingerprint import fingerprint
from pipelines.config.overrides import apply
from pipelines.config.recipes import recipe
from pipelines.config.saved import load_config
from pipelines.config.stages import evaluation_fingerprint, resolve, teacher_spec
from tests.pipeline_runs import report, unpack_finished_run

DATA = Path(__file__).parents[1] / "data"
PINNED = json.loads((DATA / "fingerprints.json").read_text())


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
def test_a_run_that_the_earlier_release_finished_is_skipped_and_reported(finished, tmp_path):
    run, output = finished
    before = unpack_finished_run(tmp_path)
    for stage in ("teacher", "k1", "k2"):
        assert f"{stage}  finished before, skipped" in output
        name = f"{stage}/model.safetensors"
        assert (run / name).stat().st_mtime == (before / name).stat().st_mtime  # that of the archive
    assert "is up to date" in output
    mine, theirs = ([{**stage, "path": ""} for stage in report(folder)["stages"]] for folder in (run, before))
    assert mine == theirs
    assert not (run / "archive").exists()
    assert load_config(run / "config.yaml").student.k == 2  # that release wrote no such file
