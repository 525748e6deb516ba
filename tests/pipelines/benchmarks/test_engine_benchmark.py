"""The decode benchmark on a tiny student: what it counts, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kforcing.metrics.flops import predicted_ar_step, predicted_step
from pipelines.benchmarks.engine import Machine, Row, Work, crossover, engine_rounds, roofline_ms
from tests.models import VOCAB, make_backbone, make_sequential

ROOT = Path(__file__).parents[3]


def test_only_returned_tokens_count():
    backbone = make_backbone()
    work = Work([[1, 2, 3], [4, 5, 6]], tokens=8, rounds=1, eos=None)
    rounds = engine_rounds(Row("AR", backbone), work, torch.device("cpu"))
    ms, rate = next(rounds)
    assert rate == pytest.approx(2 / ms * 1e3)
    every_token = Work(work.prompts, 8, 1, eos=None)
    stopped = [
        next(engine_rounds(Row("AR", backbone), Work(every_token.prompts, 8, 1, t), torch.device("cpu")))
        for t in range(VOCAB)
    ]
    assert min(rate * ms for ms, rate in stopped) < 2e3


def test_the_roofline_is_the_slower_of_bytes_and_arithmetic():
    backbone = make_backbone()
    step = predicted_ar_step(backbone)
    row = Row("AR", backbone)
    memory_bound = Machine(1.0, 1e30)
    assert roofline_ms(row, backbone, 1, 0, memory_bound) == pytest.approx(step.bytes * 1e3)
    assert roofline_ms(row, backbone, 4, 0, memory_bound) == pytest.approx(step.bytes * 1e3)
    assert roofline_ms(row, backbone, 4, 0, Machine(1e30, 1.0)) == pytest.approx(4 * step.flops * 1e3)


def test_one_token_of_a_sequential_student_costs_an_ar_step():
    student = make_sequential(make_backbone())
    assert predicted_step(student, 1) == predicted_ar_step(student.backbone)


def test_k_tokens_a_step_stop_paying_where_arithmetic_binds():
    student = make_sequential(make_backbone())
    ar, row = Row("AR", student.backbone), Row("k=4", student, 4)
    at = crossover(row, ar, student.backbone, 8, Machine(1e9, 1e10))
    assert at is not None
    rates = {
        b: [r.k / roofline_ms(r, student.backbone, b, 8, Machine(1e9, 1e10)) for r in (row, ar)] for b in (at - 1, at)
    }
    assert rates[at][0] <= rates[at][1]
    assert at == 1 or rates[at - 1][0] > rates[at - 1][1]


@pytest.mark.cluster
def test_the_command_prints_tables_and_one_json_object(tmp_path):
    make_sequential(make_backbone()).save_pretrained(tmp_path / "student")
    words = ["--student", tmp_path / "student", "--batch", "1,2", "--context", "8", "--tokens", "4", "--rounds", "2"]
    words += ["--output", tmp_path / "bench", "--k", "2,4", "--tracking", f"sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines" / "benchmark.py", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert set(record["results"]) == {"batch 1, context 8", "batch 2, context 8"}
    first = record["results"]["batch 1, context 8"]
    assert list(first) == [
        "transformers",
        "transformers, prompt lookup",
        "engine, AR",
        "engine, sequential k=2",
        "engine, sequential k=4",
    ]
    assert all(len(point["tokens_per_s"]) == 2 and min(point["tokens_per_s"]) > 0 for point in first.values())
    assert set(record["crossover_batch"]) == {"engine, sequential k=2", "engine, sequential k=4"}
    assert {f.name for f in (tmp_path / "bench").iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("kforcing-benchmark").experiment_id])
    logged = run.data.metrics["engine_AR/batch_2_context_8/tokens_per_s"]
    rates = sorted(record["results"]["batch 2, context 8"]["engine, AR"]["tokens_per_s"])
    assert rates[0] <= logged <= rates[1]
