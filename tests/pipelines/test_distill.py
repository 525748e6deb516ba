"""The whole pipeline for real: embedded Ray, DeepSpeed on two ranks, sqlite MLflow, processes killed in the middle."""

import json
import os
import re
import signal
import subprocess

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kforcing import PushForwardLM
from tests.models import CONFIGS
from tests.pipeline_runs import (
    LONG_K2,
    command,
    copy_of,
    distill,
    environment,
    hear_interrupts,
    processes_below,
    report,
    run_command,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster


def same_data(smoke):
    """Words of a run like the smoke run, over its prepared data."""
    return ("--recipe", "smoke", LONG_K2, f"data.cache_dir={smoke[0].parent / 'data'}")


def figures(stage):
    names = ("match", "student_nll", "teacher_nll", "target_nll")
    return torch.tensor([x["value"] for name in names for x in stage[name]] + [stage["block_match"]["value"]])


def test_every_stage_leaves_a_loadable_model_and_the_report_says_so(smoke):
    run, _ = smoke
    AutoModelForCausalLM.from_pretrained(run / "teacher")
    stages = report(run)["stages"]
    assert [(s["name"], s["k"]) for s in stages] == [("k1", 1), ("k2", 2), ("k4", 4)]
    tokenizer = AutoTokenizer.from_pretrained(run / "k4")
    for s in stages:
        student = PushForwardLM.from_pretrained(s["path"])
        assert student.k == s["k"] == len(s["match"])
        for figure in [*s["match"], s["block_match"], *s["student_nll"], *s["teacher_nll"]]:
            assert figure["lo"] <= figure["value"] <= figure["hi"]
        ids = torch.tensor([tokenizer.encode("Fellow citizens")])
        assert len(student.continue_prompts(ids, max_new_tokens=6)[0]) == 6
    text = (run / "report.md").read_text()
    assert "| k4 | 1 |" in text
    assert all((run / name).stat().st_size > 10_000 for name in ("match.png", "training.png"))
    assert len(report(run)["samples"]) == 3
    exact = report(run)["exact_mode"]
    assert (exact["student"], exact["texts"], exact["equal"]) == ("k4", 24, 24)
    assert all(1 <= value <= 4 for value in exact["tokens_a_step"].values())
    assert set(exact["speed"]) == {"1", "4"}
    assert "k4, exact mode: the AR model's own text (24 of 24 texts are equal)" in text


def test_the_teacher_is_inside_every_student(smoke):
    """k = 1 is the teacher without training, and later stages leave its weights alone."""
    run, output = smoke
    assert "k1  is the teacher itself: nothing to train" in output
    stages = report(run)["stages"]
    assert stages[0]["match"][0]["value"] == 1.0
    assert all(s["match"][0]["value"] > 0.999 for s in stages)
    teacher = load_file(run / "teacher" / "model.safetensors")
    for name in ("k1", "k2", "k4"):
        student = load_file(run / name / "model.safetensors")
        assert all(torch.equal(student[f"backbone.{n}"], w) for n, w in teacher.items())


def test_progress_is_one_readable_line_and_ray_is_quiet(smoke):
    _, output = smoke
    line = r"k4       step 24/24  loss \d+\.\d+  match( \d\.\d\d){4}  [\d,]+ tokens/s  data wait \d+%  ETA 0:00"
    assert re.search(line, output)
    noise = [x for x in output.splitlines() if "pid=" in x or "INFO" in x or "Warning" in x]
    assert noise == []


def test_mlflow_holds_a_parent_and_comparable_children(smoke):
    run, _ = smoke
    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("kforcing")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {"teacher", "k1", "k2", "k4"}
    assert all(r.info.status == "FINISHED" for r in runs)
    assert parent.data.params["train.steps"] == "24"
    assert {d.dataset.name for d in parent.inputs.dataset_inputs} == {"sotu:train", "sotu:heldout"}
    common = {
        "train/loss",
        "train/match_1",
        "train/block_match",
        "train/tokens_per_s",
        "train/data_wait",
        "tokens_seen",
    }
    for name in ("teacher", "k2", "k4"):
        assert common <= set(children[name].data.metrics), name
        steps = [m.step for m in client.get_metric_history(children[name].info.run_id, "train/loss")]
        assert sorted(set(steps)) == list(range(4, 161 if name == "k2" else 25, 4))
    assert all("eval/block_match" in children[f"k{k}"].data.metrics for k in (1, 2, 4))
    for k in (1, 2, 4):
        version = client.get_model_version_by_alias("kforcing-smoke", f"k{k}")
        assert version.run_id == children[f"k{k}"].info.run_id
        folder = download_artifacts(artifact_uri=version.source)
        assert PushForwardLM.from_pretrained(folder).k == k
    assert {"config.yaml", "report.md", "match.png"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}


def in_the_middle_of_k2(words, folder, step):
    """A run at this step of its stage k2 or a little later; `out.txt` and `err.txt` hold what it says."""
    out, err = folder / "out.txt", folder / "err.txt"
    with open(out, "w") as stdout, open(err, "w") as stderr:
        line = command("distill.py", *words)
        process = subprocess.Popen(
            line, stdout=stdout, stderr=stderr, cwd=folder, env=environment(), preexec_fn=hear_interrupts
        )

    def said():
        return out.read_text() + err.read_text()

    def far_enough():
        assert process.poll() is None, said()
        return any(int(made) >= step for made in re.findall(r"k2 +step (\d+)/160", said()))

    wait_until(far_enough, said, 400)
    return process


def last_line_of(process, folder, code):
    assert process.wait(timeout=300) == code
    assert "Traceback" not in (folder / "out.txt").read_text()
    lines = (folder / "err.txt").read_text().splitlines()
    (line,) = (line for line in lines if "logging.cc" not in line)  # Ray says at its start how much it will say
    return line


def interrupt(process, folder):
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
    assert last_line_of(process, folder, 130) == "interrupted; run the same command to continue"


def kill_controller(process, folder):
    """The controller of Ray Train dies."""
    (controller,) = processes_below(process.pid, "ray::TrainController")
    os.kill(controller, signal.SIGKILL)
    assert last_line_of(process, folder, 3) == (
        "error: stage k2: the controller of Ray Train died. Its last checkpoint is kept. Remove the cause and run the same "
        "command again: it continues from there"
    )


def kill_driver(process, folder):
    """The driver dies."""
    process.kill()
    process.wait(timeout=60)


STOPS = [((40, interrupt), (90, kill_controller)), pytest.param(((60, kill_driver),), marks=pytest.mark.slow)]


@pytest.mark.parametrize("stops", STOPS, ids=["interrupted, controller killed", "driver killed"])
def test_a_run_that_is_stopped_in_a_stage_ends_with_the_figures_of_an_undisturbed_one(smoke, tmp_path, stops):
    run = copy_of(smoke[0], tmp_path / "run", "k2", "k4")
    words = (*same_data(smoke), "student.k=2", f"output_dir={run}")
    for step, stop in stops:
        stop(in_the_middle_of_k2(words, tmp_path, step), tmp_path)
    done = distill(*words, cwd=tmp_path)
    assert "teacher  finished before, skipped" in done.stdout
    assert "k1  finished before, skipped" in done.stdout
    first = int(re.search(r"k2 +step (\d+)/160", done.stdout)[1])
    assert first > stops[-1][0] - 8  # from the last checkpoint, not from the start
    a, b = (report(folder)["stages"][1] for folder in (smoke[0], run))
    torch.testing.assert_close(figures(b), figures(a), rtol=1e-3, atol=1e-3)
    theirs, mine = (load_file(folder / "k2" / "model.safetensors") for folder in (smoke[0], run))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_changed_stage_runs_again_alone_and_its_predecessor_is_archived(smoke, tmp_path):
    """k4 again: cached rollouts without labels, and windows of the student's own."""
    run = copy_of(smoke[0], tmp_path / "run")
    words = (*same_data(smoke), "train.workers=1", f"output_dir={run}")
    before = {name: (run / name / "model.safetensors").stat().st_mtime_ns for name in ("teacher", "k1", "k2")}

    change = (
        "stages.k4.rollout.teacher_top_k=none",
        "stages.k4.rollout.cache=true",
        "stages.k4.train.on_policy_fraction=0.5",
        "stages.k4.train.steps=12",
    )
    done = distill(*words, *change, cwd=tmp_path)
    assert "k2  finished before, skipped" in done.stdout
    assert "k4       step 12/12" in done.stdout
    assert before == {name: (run / name / "model.safetensors").stat().st_mtime_ns for name in before}
    archived = list((run / "archive").glob("k4-*/model.safetensors"))
    assert len(archived) == 1
    manifest = json.loads((run / "k4" / "rollouts" / "manifest.json").read_text())
    assert manifest["rows"] == 24  # 12 steps × 8 sequences, each trained on 4 times


@pytest.mark.slow
def test_a_stage_that_diverges_stops_the_run_and_leaves_nothing(smoke, tmp_path):
    run = copy_of(smoke[0], tmp_path / "run", "k2", "k4")
    words = ("student.k=2", "stages.k2.train.lr=100", "stages.k2.train.clip=0", "train.checkpoint_every=1")
    done = run_command(command("distill.py", *same_data(smoke), f"output_dir={run}", *words), tmp_path)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.match(r"error: stage k2: training diverged in step \d+ of 24: the .* Nothing was exported", line)
    assert not (run / "k2" / "config.json").exists()
    assert not list((run / "eval").glob("k2/manifest.json"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(client.search_model_versions("name = 'kforcing-smoke'")) == []
    runs = client.search_runs([client.get_experiment_by_name("kforcing").experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"}
    for record in (run / "log.jsonl").read_text().splitlines():
        json.loads(record, parse_constant=pytest.fail)


@pytest.fixture
def hf_teacher(tmp_path):
    """A tiny causal LM with its own byte-level tokenizer, as a user would have on disk."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(tmp_path / "teacher")
    config = CONFIGS["qwen2"].__class__(**{**CONFIGS["qwen2"].to_dict(), "vocab_size": len(fast) + 7})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_papers_recipe_on_a_given_teacher_and_jsonl_corpus_with_tracking_unreachable(hf_teacher, tmp_path, k):
    lines = [json.dumps({"body": f"Document {i}. " + "The state of the union is strong. " * 20}) for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    words = [
        "--recipe=smoke",
        "student.design.readout=argmax",
        "student.design.coupling=inverse_cdf",
        "targets=self",
        "loss=hard",
        f"teacher.path={hf_teacher}",
        "data.source=corpus.jsonl",
        "data.text_column=body",
        f"student.k={k}",
        "train.steps=8",
        "train.zero_stage=3",
        "student.design.noise.temperature_min=0.7",
        "eval.new_tokens=8",
        "output_dir=run",
    ]
    done = distill(*words, cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "tracking to http://127.0.0.1:9 failed, training goes on" in done.stderr
    assert [s["k"] for s in report(tmp_path / "run")["stages"]] == [1, 2][:k]
    student = PushForwardLM.from_pretrained(tmp_path / "run" / f"k{k}")
    assert student.backbone.config.model_type == "qwen2"
    assert student.config.design.noise.temperature_min == 0.7
    events = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(e.get("event") == "train" and e["stage"] == f"k{k}" and e["step"] == 8 for e in events)


def test_mistakes_end_in_one_line_without_a_traceback(tmp_path):
    done = run_command(command("distill.py", "--recipe", "smoke", "train.stepz=3"), tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown config key 'train.stepz'; did you mean 'train.steps'?"
    assert list(tmp_path.iterdir()) == []
