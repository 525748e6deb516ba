"""The comparison of recipes, small: real tasks on a real embedded cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline_runs import environment

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[3]
SMALL = [
    "--share=0.006",
    "--samples=256",
    "--only=sequential;head alone",
    "teacher.train.steps=8",
    "teacher.hidden=32",
    "teacher.mlp=64",
    "data.max_docs=64",
    "tracking.uri=off",
    "output_dir=out",
]


def compare(folder, *words):
    line = [sys.executable, "-m", "pipelines.benchmarks.compare", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment(), timeout=600)


@pytest.mark.slow
def test_variants_spend_the_same_and_finished_ones_are_kept(tmp_path):
    done = compare(tmp_path, *SMALL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1])["jobs"] == 3
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    spent = {name: runs[0]["k"]["4"]["spent"] for name, runs in results.items()}
    assert set(spent) == {"paper", "sequential", "head alone"}
    assert all(abs(x / spent["paper"] - 1) < 0.05 for x in spent.values())
    figures = results["sequential"][0]["k"]["4"]
    assert figures["kl"][0] < 1e-5
    assert figures["match"]["gumbel"][0] == figures["match"]["inverse_cdf"][0] == 1
    assert 0 < figures["floor"] < 1
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| head alone | 1 |" in text
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("result.json")}
    assert len(files) == 3
    assert compare(tmp_path, *SMALL).returncode == 0
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("result.json")}


def test_an_unknown_variant_is_refused(tmp_path):
    done = compare(tmp_path, "--only=sequentiel", "output_dir=out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only sequentiel: the variants are paper; ")


def test_costs_are_printed_without_training(tmp_path):
    done = compare(tmp_path, "--cost")
    assert done.returncode == 0
    record = json.loads(done.stdout.splitlines()[-1])
    paper = record["12 × 768, vocabulary 32,000: paper"]
    assert paper["parameters"] == 168_321_792
    assert abs(paper["measured"]["bytes"] / paper["predicted"]["bytes"] - 1) < 0.01
    assert list(tmp_path.iterdir()) == []
