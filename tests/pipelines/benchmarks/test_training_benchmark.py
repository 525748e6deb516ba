"""The training benchmark at a tiny size: what it counts, not how fast it is."""

import json
import subprocess
import sys

import pytest

from pipelines.benchmarks.training import line

TINY = (
    "--layers 1 --width 16 --heads 2 --vocabulary 50 --memory-vocabulary 20000 --context 24 --k 2 --ks 1,2 --rounds 1"
)


@pytest.mark.cluster
def test_the_command_prints_tables_and_one_json_object():
    words = [*TINY.split(), "--chunk", "8", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.benchmarks.training", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    losses = [row["loss"] for row in record["step"].values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # three ways to the same number
    assert all(row["min"] <= row["median"] <= row["max"] for row in record["step"].values())
    flops = {name: row["flops"] for name, row in record["step"].items()}
    assert flops["staircase"] == flops["staircase, logits at once"]  # nothing is computed twice
    assert flops["staircase, logits at once"] < flops["dense mask, logits at once"]
    assert record["matmul_flops_per_s"] > 0
    assert list(record["by_k"]["ms_per_window"]) == ["1", "2"]
    assert 0 < record["peak_mb"]["chunked"] < record["peak_mb"]["at once"]
    assert "dense mask, logits at once" in done.stdout


def test_the_line_through_costs():
    assert line([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx({"per_k": 2, "at_0": 1, "largest_deviation": 0}, abs=1e-9)
    assert line([1, 2, 3], [1.0, 4.0, 9.0])["largest_deviation"] > 0.2
