"""Files of a run that are empty or cut when it is evaluated: each is named in one line."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from pipelines.config.recipes import recipe
from pipelines.config.saved import save_config
from pipelines.config.section import ConfigError
from pipelines.config.stages import resolve_run
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.report.record import _stage_seconds
from pipelines.evaluation.subject import _last_config, _mark, open_subject

CUT = ["", '{"stage": "k2", "finger']


@pytest.fixture
def warnings(caplog):
    return caplog


@pytest.fixture
def run(tmp_path):
    """The run directory of finished stages, as far as `open_subject` reads it."""
    config = dataclasses.replace(recipe("smoke"), output_dir=str(tmp_path))
    save_config(config)
    (tmp_path / "log.jsonl").write_text("")
    for name in ("teacher", *(spec.name for spec in resolve_run(config).students)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"stage": name, "fingerprint": f"{name}-f00"}))
    return tmp_path


@pytest.mark.parametrize("text", CUT)
def test_a_stage_with_a_cut_manifest_is_not_finished(run, text, warnings):
    assert open_subject(str(run), EvaluationConfig())[1] == run / "evaluation"
    (run / "k2" / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"k2 not finished; run pipelines/distill.py output_dir=.* to its end"):
        open_subject(str(run), EvaluationConfig())
    assert f"{run}/k2/manifest.json is empty or cut" in warnings.text


def test_a_model_whose_manifest_is_cut_is_named_by_its_weights(run, warnings):
    assert _mark(run / "k2") == "k2-f00"
    (run / "k2" / "model.safetensors").write_bytes(b"weights")
    (run / "k2" / "manifest.json").write_text("")
    (digest,) = _mark(run / "k2")
    assert len(digest) == 32
    assert f"{run}/k2/manifest.json is empty or cut" in warnings.text


@pytest.mark.parametrize("text", CUT)
def test_the_times_of_a_run_with_a_cut_report_are_unknown(run, text, warnings):
    subject = SimpleNamespace(run=resolve_run(dataclasses.replace(recipe("smoke"), output_dir=str(run))), parent=None)
    cost = {"name": "k2", "seconds": 8.0, "data_wait": 0.25, "steps": 2}
    (run / "report.json").write_text(json.dumps({"costs": [cost]}))
    assert _stage_seconds(subject)["k2"]["wall_s"] == 8.0
    (run / "report.json").write_text(text)
    assert _stage_seconds(subject) == {}
    assert f"{run}/report.json is empty or cut" in warnings.text


def test_the_last_whole_config_of_a_log_counts(tmp_path):
    lines = [json.dumps({"event": "config", "recipe": name}) for name in ("smoke", "toy")]
    (tmp_path / "log.jsonl").write_text(lines[0] + "\n" + lines[1] + "\n" + lines[0][:-5])
    assert _last_config(tmp_path / "log.jsonl")["recipe"] == "toy"
