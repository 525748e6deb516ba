"""The settings of a deployment."""

import logging

import pytest

from serve.app import build
from serve.settings import read_settings


def test_settings_may_be_text_and_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k4").mkdir()
    settings = read_settings({"model": "k4", "max_num_seqs": "8", "batch_invariant": "true", "teacher": "none"})
    assert (settings.model, settings.max_num_seqs, settings.batch_invariant) == (str(tmp_path / "k4"), 8, True)


def test_a_former_name_still_works_and_one_warning_names_the_new_one(caplog):
    with caplog.at_level(logging.WARNING, "ray.serve"):
        settings = read_settings({"model": "x", "slots": "8", "max_len": 64, "prefill_tokens": 32})
    assert (settings.max_num_seqs, settings.max_model_len, settings.max_num_batched_tokens) == (8, 64, 32)
    assert caplog.messages == [
        "the setting slots is now called max_num_seqs; please use the new name",
        "the setting max_len is now called max_model_len; please use the new name",
        "the setting prefill_tokens is now called max_num_batched_tokens; please use the new name",
    ]


def test_a_former_name_beside_the_new_one_is_refused():
    with pytest.raises(ValueError, match="slots=8: this setting is now called max_num_seqs, which is given too"):
        read_settings({"model": "x", "slots": 8, "max_num_seqs": 4})


def test_blanks_around_a_key_do_not_count_and_an_empty_key_is_refused(monkeypatch):
    assert read_settings({"model": "x", "api_key": " secret\n"}).api_keys == ["secret"]
    assert read_settings({"model": "x", "api_key": "one, two"}).api_keys == ["one", "two"]
    with pytest.raises(ValueError, match="a key is empty; leave out both api_key and KFORCING_API_KEY"):
        read_settings({"model": "x", "api_key": " "})
    monkeypatch.setenv("KFORCING_API_KEY", "")
    with pytest.raises(ValueError, match="a key is empty"):
        build({"model": "x"})


def test_impossible_settings_are_refused_before_anything_is_deployed():
    for given, message in (
        ({}, "model: Field required"),
        ({"model": "x", "max_num_seq": 3}, "did you mean max_num_seqs"),
        ({"model": "x", "api-key": "SECRET"}, "^there is no setting api-key; did you mean api_key\\?$"),
        ({"model": "x", "max_num_seqs": 0}, "max_num_seqs=0"),
        ({"model": "x", "min_replicas": 3, "max_replicas": 2}, "min_replicas=3"),
    ):
        with pytest.raises(ValueError, match=message):
            build(given)
