"""The command that measures drafts from the context."""

import json
import sys

import pytest

from kforcing.loading import load_model, load_tokenizer
from pipelines.benchmarks import drafts
from tests.endpoint import save_model


@pytest.mark.parametrize("name", ["ar", "student"])
def test_every_row_of_the_table_has_its_figures(tmp_path, monkeypatch, capsys, name):
    student = save_model(tmp_path / "student")
    backbone = load_model(student).backbone
    backbone.save_pretrained(tmp_path / "ar")
    load_tokenizer(student).save_pretrained(tmp_path / "ar")
    (tmp_path / "p.jsonl").write_text('{"prompt": "abcabc"}\n{"prompt": "hello"}\n')
    words = [tmp_path / name, "--prompts", tmp_path / "p.jsonl", "--new", 20, "--k", 2]
    monkeypatch.setattr(sys, "argv", ["drafts", *map(str, words)])
    drafts.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["prompts"], row["temperature"]) for row in rows] == [("p", 0.0), ("p", 0.7)]
    for row in rows:
        assert row["chosen"] > 0  # EOS, which may come early, is no token
        assert row["k"] <= 1 + row["drafted"] * row["accepted"] + 1e-6
        assert 0 <= row["accepted"] <= 1
        assert row["speed"][1] > 0
