"""Exact mode has the AR model's own joint distribution, and the command that measures it has all its figures."""

import json
import sys

import pytest

from pipelines.benchmarks import exactness


@pytest.mark.slow
def test_100_000_tokens_of_exact_mode_have_the_ar_models_joint_distribution():
    joint = exactness.measure_joint(100_000)
    exact, fixed = joint["exact"], joint["fixed"]
    assert exact["tokens_a_step"] > 1.1
    assert abs(exact["tv"] - joint["floor"]) < 3 * joint["floor_sd"]
    assert abs(exact["nll"] - joint["entropy"]) < 3 * exact["nll_se"]
    assert (exact["tv"], exact["nll"]) == (joint["ar"]["tv"], joint["ar"]["nll"])
    assert fixed["tv"] > joint["floor"] + 20 * joint["floor_sd"], "the measure tells another distribution"


@pytest.mark.long
def test_the_command_prints_both_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exactness", "--tokens", "400", "--bf16", "random", "--new", "8"])
    exactness.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["joint"]["exact"]["nll"] == figures["joint"]["ar"]["nll"]
    assert [row["temperature"] for row in figures["bf16"]] == [0.0, 1.0]
    for row in figures["bf16"]:
        assert 0 < row["tokens"] <= 64
        assert row["rate"] == row["differ"] / row["tokens"]
