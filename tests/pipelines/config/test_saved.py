"""`config.yaml` of a run directory holds the whole config, and a command line takes it."""

import dataclasses
import json
import os

import pytest

from pipelines.config.command_line import read_command_line
from pipelines.config.overrides import apply
from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.saved import load_config, save_config
from pipelines.config.section import ConfigError
from pipelines.config.stages import resolve_run
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.subject import open_subject

CHANGES = [
    "seed=7",
    "train.eps=1e-7",
    "stages.k2.train.steps=5",
    "stages.k2.targets=self",
    "rollout.teacher_top_k=none",
]


def saved(name, folder, words=()):
    config = apply(recipe(name), {}, [*words, f"output_dir={folder}"])
    config.root.mkdir(exist_ok=True)
    save_config(config)
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_from_its_file(name, tmp_path):
    config = saved(name, tmp_path, CHANGES)
    assert load_config(tmp_path / "config.yaml") == config
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_command_line_takes_the_file(tmp_path):
    config = saved("smoke", tmp_path / "run", CHANGES[:2])
    file = str((tmp_path / "run" / "config.yaml").rename(tmp_path / "saved.yaml"))
    (tmp_path / "run").rmdir()
    assert read_command_line("", ["--config", file]) == config


def test_a_file_of_another_release_is_refused_by_its_key(tmp_path):
    saved("smoke", tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("max_docs", "most_documents"))
    with pytest.raises(ConfigError, match=r"another release: unknown config key 'data.most_documents'"):
        load_config(file)


def finished(run, config):
    """The marks that all stages of a run are finished."""
    for stage in ("teacher", *(f"k{k}" for k in config.ks())):
        (run / stage).mkdir()
        (run / stage / "manifest.json").write_text("{}")


def test_an_evaluation_reads_the_file_and_not_the_log(tmp_path):
    config = saved("smoke", tmp_path, CHANGES)
    finished(tmp_path, config)
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "config", "recipe": "other"}) + "\n")
    run, root = open_subject(str(tmp_path), EvaluationConfig())
    assert run == resolve_run(config)
    assert root == tmp_path / "evaluation"


def test_an_evaluation_of_an_older_run_reads_its_log_or_says_how_to_get_the_file(tmp_path):
    config = apply(recipe("smoke"), {}, ["train.steps=9"])
    finished(tmp_path, config)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"event": "config", "run": "a-1", "recipe": "smoke", "train.steps": "9"}) + "\n")
    run, _ = open_subject(str(tmp_path), EvaluationConfig())
    assert run == resolve_run(dataclasses.replace(config, output_dir=str(tmp_path)))
    log.write_text(json.dumps({"event": "config", "recipe": "smoke", "train.stride": "9"}) + "\n")
    with pytest.raises(ConfigError, match=r"unknown config key 'train.stride'.*run pipelines/distill.py once more"):
        open_subject(str(tmp_path), EvaluationConfig())


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_saved_config_that_was_cut_is_refused_and_does_not_read_as_a_shorter_one(tmp_path, share):
    saved("toy", tmp_path, CHANGES)
    file = tmp_path / "config.yaml"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"config.yaml is empty or cut; run pipelines/distill.py once more"):
        load_config(file)


def test_a_saved_config_of_an_earlier_release_has_no_last_line(tmp_path):
    config = saved("toy", tmp_path, CHANGES)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().removeprefix("---\n").removesuffix("...\n"))
    assert load_config(file) == config
