"""The evaluation for real: every method trained and decoded on a tiny run (slow: on a smoke run), killed, tracked."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient
from transformers import GPT2Config, LlamaConfig

from kforcing import Design, SequentialConfig
from pipelines.config.overrides import leaves
from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.schema import TrainConfig
from pipelines.config.section import ConfigError
from pipelines.config.stages import resolve_run
from pipelines.evaluation.baseline_training import spent_by
from pipelines.evaluation.baselines import METHODS, rows_of
from pipelines.evaluation.config import EvaluationConfig, evaluation_config
from pipelines.evaluation.decoders import MethodRow, slug
from pipelines.evaluation.measure.determinism import flips
from pipelines.evaluation.parts import Part, ready_parts
from pipelines.evaluation.plan import _check_positions
from pipelines.evaluation.report.cells import flops
from pipelines.evaluation.report.legend import REPORTED
from pipelines.evaluation.report.record import cost_record
from pipelines.evaluation.subject import Student, block_sizes, config_of, open_subject
from pipelines.training.single_process import shortened
from tests.pipeline_runs import copy_with_tracking, environment
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
SMALL = [
    "text.external=none",
    "text.prompts=8",
    "text.prompt_tokens=8",
    "text.new_tokens=16",
    "fidelity.blocks=16",
    "fidelity.windows=4",
    "fidelity.contexts=3",
    "fidelity.samples=64",
    "fidelity.free_prompts=8",
    "fidelity.free_tokens=6",
    "bootstrap=100",
    "speed.rounds=1",
    "speed.batches=1,2",
]


class Case(NamedTuple):
    """A run to evaluate, the largest k of its students, the share of its FLOPs for a method, and the rows of the table."""

    fixture: str
    k: int
    share: float
    rows: int

    @property
    def exact(self):
        """The rows in exact mode."""
        names = [f"this run, k{self.k}, exact at k={width}" for width in (self.k, "auto")]
        return [*names, f"K-Forcing, sequential, k{self.k}, exact at k={self.k}"]


TINY = Case("finished", 2, 2.0, 21)
WHOLE = Case("smoke", 4, 0.03, 29)


def command(*words):
    return [sys.executable, str(ROOT / "pipelines" / "evaluate.py"), *words]


def evaluate(*words, cwd):
    done = subprocess.run(command(*words), capture_output=True, text=True, cwd=cwd, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def figures(tree):
    """Every {value, lo, hi} below."""
    if isinstance(tree, dict) and {"value", "lo", "hi"} <= set(tree):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [found for item in items for found in figures(item)]


@pytest.fixture(scope="module", params=[TINY, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["tiny", "whole"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def run(request, case, tmp_path_factory):
    """A finished run of this module's own, with its MLflow store."""
    return copy_with_tracking(request.getfixturevalue(case.fixture)[0], tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def killed(run, case):
    """An evaluation of the run, killed with the first rows done, and continued."""
    words = [str(run), *SMALL, f"baselines.share={case.share}"]
    cwd, root = run.parent.parent, run / "evaluation"

    def output():
        return (cwd / "evaluation.log").read_text()[-3000:]

    with open(cwd / "evaluation.log", "w") as log:
        first = subprocess.Popen(
            command(*words), stdout=log, stderr=log, cwd=cwd, env=environment(), start_new_session=True
        )

        def a_row_is_done():
            assert first.poll() is None, output()
            return list(root.glob("row-*/manifest.json"))

        wait_until(a_row_is_done, output, 600, pause=0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(timeout=60)
    before = {f: f.stat().st_mtime_ns for f in root.glob("*/manifest.json")}
    return root, before, evaluate(*words, cwd=cwd)


@pytest.mark.cluster
def test_a_killed_evaluation_continues_where_it_stopped(killed):
    root, before, done = killed
    assert len(before) >= 3
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())
    parts = len([f for f in before if "windows-" not in f.parent.name])
    assert f"{parts} of " in done.stdout
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["path"] == str(root / "report.json")


@pytest.mark.cluster
def test_every_row_of_the_table_is_filled_by_a_run(killed, case):
    root, _, _ = killed
    report = json.loads((root / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == case.rows
    for name, row in rows.items():
        assert set(row["tokens_per_s"]) == ({"1"} if name == "transformers, assisted" else {"1", "2"})
        assert row["passes"] > 0
        untrained = name.startswith("AR") or name == "this run, k1 at k=1"
        assert (row["training"]["flops"] == 0) == untrained, name
        assert row["nll"]["value"] > 0
        assert ("joint" in row) == (name != "transformers, assisted")
    spent = {s["name"]: s["rollouts"] + s["train"] for s in report["cost"]["stages"]}
    learning = [spent[f"k{k}"] for k in (2, 4) if k <= case.k]
    assert rows[f"this run, k{case.k} at k=1"]["training"]["flops"] == sum(learning) == report["cost"]["flops"]
    if case.k == 4:
        assert rows["this run, k2 at k=2"]["training"]["flops"] == spent["k2"]
    spent = {row["method"]: row["training"]["flops"] for row in rows.values() if row["method"]}
    assert set(spent) == set(METHODS)
    budget = case.share * report["cost"]["flops"]
    assert all(0.5 * budget < s < 2 * budget for s in spent.values()), (budget, spent)  # a step is a coarse coin here
    for figure in figures(report):
        assert math.isfinite(figure["value"])
        assert figure["lo"] is None or figure["lo"] <= figure["value"] <= figure["hi"]
    assert rows["AR, engine"]["joint"]["excess"]["value"] == pytest.approx(
        rows["AR, engine"]["joint"]["tv"]["value"] - report["references"]["joint"]["tv"]["value"]
    )
    references = report["references"]
    assert references["joint"]["documents"] == 3  # one for each context
    apart = references["joint_independent"]
    assert apart["excess"]["value"] == pytest.approx(apart["tv"]["value"] - references["joint"]["tv"]["value"])
    text = (root / "report.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert "Reported by the paper" in text


@pytest.mark.cluster
def test_lossless_rows_follow_the_ar_model_exactly(killed, case):
    root, _, _ = killed
    report = json.loads((root / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    k, exact = case.k, case.exact
    verified = [f"PTP, k={k}, verified", f"Medusa, k={k}, verified"]
    for name in ("AR, engine", "this run, k1 at k=1", f"K-Forcing, sequential, k{k} at k=1", *verified, *exact):
        assert rows[name]["tokens_until_divergence"]["value"] == 16
    for name in exact:
        assert all(rows[name][figure] == rows["AR, engine, Gumbel"][figure] for figure in ("nll", "entropy", "joint"))
        assert 1 / k <= rows[name]["passes"] <= 1
    assert rows[exact[0]]["passes"] < 1
    assert rows["AR, engine"]["passes"] == 1
    assert report["joint"]["k1 at k=1"]["tv"]["value"] < 1e-6
    assert report["free"][f"k{k} at k=1"]["match"][-1]["value"] == 1
    assert rows[f"K-Forcing, paper, k{k} at k={k}"]["passes"] == 1 / k
    assert rows["MDLM, 2 a pass"]["passes"] == 0.5
    ptp, medusa = (rows[name]["passes"] for name in verified)
    assert 2 / (k + 1) <= ptp <= 2
    assert 1 / (k + 1) <= medusa <= 1
    assert all(f["texts"] == 0 for n, f in report["determinism"]["ar"]["flips"].items() if "batch-invariant" in n)


@pytest.mark.cluster
def test_mlflow_holds_the_evaluation_below_the_run_and_a_row_below_it(killed, run, case):
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    parent = json.loads((run / "mlflow.json").read_text())["parent"]
    experiment = client.get_run(parent).info.experiment_id
    below = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}' and tags.evaluation = '{run.name}'")
    assert len(below) == 1
    assert "config.yaml" in {f.path for f in client.list_artifacts(parent)}
    names = {f.path for f in client.list_artifacts(below[0].info.run_id)}
    assert {"report.md", "report.json", "samples.html", "match.png", "distance.png", "baselines.png"} <= names
    rows = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{below[0].info.run_id}'")
    assert len(rows) == case.rows
    metrics = [set(row.data.metrics) for row in rows]
    assert all({"eval/nll", "eval/entropy", "eval/passes", "eval/tokens_per_s/1"} <= m for m in metrics)
    students = [row.data.metrics for row in rows if re.match("this run, k. at k=", row.info.run_name)]
    assert all({"eval/windows/match_1", "eval/next_k/tv", "eval/free/match_1"} <= set(m) for m in students)
    top = below[0].data.metrics
    assert {"eval/references/joint/tv", "eval/references/joint_independent/tv"} <= set(top)


@pytest.mark.slow
def test_a_registered_model_is_evaluated_with_the_teacher_it_carries(killed, run, case, tmp_path):
    k = case.k
    uri = f"sqlite:///{run.parent}/mlflow.db"
    words = [*SMALL, "baselines.only=off", f"tracking.uri={uri}", f"output_dir={tmp_path}/out"]
    evaluate(f"models:/kforcing-smoke@k{k}", *words, cwd=run.parent.parent)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    own = [f"this run, k{k} at k={n}" for n in range(1, k + 1)]
    assert [row["name"] for row in report["rows"][3:]] == [*own, *case.exact[:2]]
    assert report["free"][f"k{k} at k=1"]["match"][0]["value"] == 1
    of_run = json.loads((run / "evaluation" / "report.json").read_text())["cost"]
    names = ("name", "steps", "rollouts", "train")  # all stages are charged, though their students are not here
    mine, theirs = ([[stage[n] for n in names] for stage in cost["stages"]] for cost in (report["cost"], of_run))
    assert mine == theirs


def refused(*words):
    with pytest.raises(ConfigError) as error:
        evaluation_config(words)
    return str(error.value)


def test_mistakes_are_refused_with_their_value():
    assert "text.protocol=lmb: choose one of lm1b, owt" in refused("text.protocol=lmb")
    assert "did you mean 'fidelity.blocks'?" in refused("fidelity.block=3")
    assert "speed.batches=1,x" in refused("speed.batches=1,x")
    assert "text.prompts=0 must be positive" in refused("text.prompts=0")
    assert "needs judge.model" in refused("judge.url=http://localhost:1/v1")
    assert "written section.field=value" in refused("seed")


def test_the_papers_protocol_sets_prompts_lengths_and_the_cut():
    text = evaluation_config(["text.protocol=owt"]).text
    assert (text.prompts, text.prompt_tokens, text.new_tokens, text.cut_at_eos) == (1024, 64, 960, True)
    assert text.external == "openai-community/gpt2-large"
    text = evaluation_config(["text.protocol=lm1b", "text.external=smollm2"]).text
    assert text.external == "smollm2"
    assert (text.prompt_tokens + text.new_tokens, text.cut_at_eos) == (128, True)


def test_a_folder_that_is_no_run_and_a_name_that_is_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run directory \(no log.jsonl\)"):
        open_subject(str(tmp_path), EvaluationConfig())
    with pytest.raises(ConfigError, match=r"teacher=/x: .* has an AR model of its own"):
        open_subject(str(tmp_path), EvaluationConfig(teacher="/x"))
    with pytest.raises(ConfigError, match="write models:/NAME@ALIAS"):
        open_subject("models:/nothing", EvaluationConfig())


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_config_comes_back_from_its_fields_as_text(name):
    config = recipe(name)
    assert config_of({k: str(v) for k, v in leaves(dataclasses.asdict(config))}, "x") == config


def test_parts_start_in_order_and_times_are_taken_alone():
    def part(name, *needs, alone=False):
        return Part(name, (), print, None, needs, alone)

    a, b, c, clock = part("a"), part("b"), part("c", "a"), part("clock", alone=True)
    assert ready_parts([a, b, c, clock], {}, 1, False) == [a]
    assert ready_parts([a, b, c, clock], {}, 5, False) == [a, b]
    assert ready_parts([c, clock], {}, 5, True) == []
    assert ready_parts([c, clock], {"a": 1}, 5, True) == [c]
    assert ready_parts([clock], {"a": 1}, 5, True) == []
    assert ready_parts([clock], {"a": 1}, 5, False) == [clock]


def test_rows_have_names_and_folders_of_their_own():
    designs = {"sequential": Design("sequential"), "head": Design("sequential", "gumbel")}
    students = [("k4", "/x", k, "gumbel") for k in (1, 2, 4)]
    rows = rows_of(list(METHODS), students, 4, [1, 2, 3, 4], designs, students[-1])
    assert [row.name for row in rows if row.exact] == WHOLE.exact
    assert len({slug(row.name) for row in rows}) == len({row.name for row in rows}) == len(rows)
    assert slug("noise inversion A (heads), k=4") == "noise-inversion-a-heads-k-4"
    assert [row.k for row in rows if row.method == "mdlm"] == [1, 2, 4]
    assert {row.coupling for row in rows if row.method == "sequential"} == {"inverse_cdf"}
    designs["sequential"] = Design("sequential", sequential=SequentialConfig(freeze_trunk=False))
    assert not [row for row in rows_of(["sequential"], students, 4, [4], designs) if row.exact]


def test_a_staged_method_has_something_to_spend_at_every_stage_that_learns():
    for method in ("paper", "sequential", "head"):
        for ks in ([1, 2], [1, 2, 4], [1, 2, 4, 8, 16]):
            shares = spent_by(method, ks)
            assert list(shares) == ks
            assert shares[ks[-1]] == 1
            learning = [shares[k] for k in ks if method == "paper" or k > 1]
            assert all(a < b for a, b in zip([0.0, *learning], learning, strict=False))


def test_reported_speeds_are_those_of_the_paper():
    ratios = {"lm1b": (1.71, 2.46, 3.33), "owt": (1.69, 2.53, 3.47)}
    for corpus, rows in REPORTED.items():
        ar, *students = [float(row[4]) for row in rows[:4]]
        assert [round(s / ar, 2) for s in students] == pytest.approx(ratios[corpus], abs=0.011)


def test_a_shorter_training_warms_up_for_the_same_share():
    train = TrainConfig(steps=500, warmup=50)
    assert (shortened(train, 50).steps, shortened(train, 50).warmup) == (50, 5)
    assert (shortened(train, 900).steps, shortened(train, 900).warmup) == (900, 50)


@pytest.mark.parametrize("config", [GPT2Config(n_positions=48), LlamaConfig(max_position_embeddings=48)])
def test_texts_longer_than_the_model_are_refused_before_anything_starts(config, tmp_path):
    config.save_pretrained(tmp_path)
    words = ["text.prompt_tokens=16", "text.new_tokens=32"]
    with pytest.raises(ConfigError, match="= 53 exceeds the model's 48 positions"):
        _check_positions(tmp_path, evaluation_config(words), k=4)
    _check_positions(tmp_path, evaluation_config([*words[:1], "text.new_tokens=27"]), k=4)


def test_block_sizes():
    assert block_sizes(1) == [1]
    assert block_sizes(4) == [1, 2, 3, 4]
    assert block_sizes(16) == [1, 2, 3, 4, 8, 16]


def test_flips_count_to_the_first_difference():
    import torch

    one = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    other = torch.tensor([[1, 2, 9, 9], [5, 6, 7, 8]])
    assert flips(one, other) == {"texts": 0.5, "tokens": 1 / 7}
    assert flips(one, one) == {"texts": 0, "tokens": 0}


def test_break_even_is_cost_over_saving(tmp_path):
    class Subject:
        run = resolve_run(dataclasses.replace(recipe("smoke"), output_dir=str(tmp_path)))
        students = (Student("k2", 2, "/k2"), Student("k4", 4, "/k4"))
        parent = None

    rate = {"16": {"value": 100.0}}
    results = {
        "cost": {
            "stages": [
                {"name": "teacher", "k": 0, "device_s": 99.0, "rollouts": 0.0, "train": 9e9},
                {"name": "k2", "k": 2, "device_s": 50.0, "rollouts": 1e9, "train": 3e9},
                {"name": "k4", "k": 4, "rollouts": 1e9, "train": 3e9},
            ],
            "flops": 8e9,
            "decoding": [
                {"name": "AR", "k": 1, "flops_a_token": 2e6},
                {"name": "k2", "k": 2, "flops_a_token": 1e6},
                {"name": "k4", "k": 4, "flops_a_token": 3e6},
            ],
        },
        "speed": {
            "rows": {
                "AR, engine": {"16": {"value": 1.0}},
                "AR, engine, Gumbel": rate,
                "this run, k2 at k=2": {"16": {"value": 200.0}},
                "this run, k4 at k=4": {"16": {"value": 50.0}},
            }
        },
    }
    rows = [
        MethodRow("AR, engine", 1, "ar"),
        MethodRow("AR, engine, Gumbel", 1, "ar", coupling="gumbel"),
        MethodRow("this run, k2 at k=2", 2, "engine", path="/k2", coupling="gumbel"),
        MethodRow("this run, k4 at k=4", 4, "engine", path="/k4", coupling="gumbel"),
    ]
    two, four = cost_record(Subject, rows, results)["savings"]
    assert two["even_flops"] == 4000
    assert two["even_16"] == pytest.approx(50 / (1 / 100 - 1 / 200))
    assert four["flops"] == 8e9
    assert four["even_flops"] == "never"
    assert four["even_16"] == "unknown"  # nobody measured the seconds of k4
    assert flops(1.234e13) == "12.3 T"
