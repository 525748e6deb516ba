import sys

import pytest
import torch

from kforcing import PushForwardLM
from kforcing.attention.windows import Windows
from kforcing.coupling import COUPLINGS
from kforcing.distillation.steps import ARStep, StudentStep, TokenBatch, WindowBatch
from kforcing.distillation.teachers import ARTeacher, StudentTeacher
from kforcing.distillation.text import TextBatch, TextStep
from kforcing.metrics.flops import flop_counter
from kforcing.noise import window_noise
from pipelines import distill
from pipelines.config.overrides import override
from pipelines.config.recipes import recipe
from pipelines.config.schema import Config
from pipelines.config.stages import resolve
from pipelines.runs.plan import describe_plan, plan_run
from pipelines.training.initial_model import AR

BLOCK, WINDOWS = 32, 24


def small(name: str, *changes: str) -> Config:
    """A recipe with a small AR model that is trained, and two steps of two sequences."""
    config = recipe(name)
    train = ["steps=2", "batch=2", "micro_batch=2", "workers=1", "sampled_tokens=0"]
    words = [f"{section}.{word}" for section in ("train", "teacher.train") for word in train] + [
        *("teacher.path=none", "teacher.hidden=64", "teacher.layers=4", "teacher.heads=4", "teacher.mlp=128"),
        *(
            "tokenizer.vocab_size=600",
            f"data.block={BLOCK}",
            f"rollout.windows={WINDOWS}",
            "data.source=sotu",
            *changes,
        ),
    ]
    for word in words:
        path, _, value = word.partition("=")
        config = override(config, path, value)
    return config


def models(config: Config) -> tuple[ARStep, PushForwardLM]:
    """The first model of a run, and a student of it."""
    step, other = (AR(config.teacher, config.tokenizer.vocab_size, eos=0, seed=0).build() for _ in range(2))
    return step, PushForwardLM.from_backbone(other.model, config.student.k, config.student.design).eval()


def batch(k: int) -> tuple[Windows, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    context = torch.randint(0, 600, (2, BLOCK), generator=g)
    anchors = torch.arange(WINDOWS).expand(2, -1)
    return Windows(context, anchors, window_noise(0, torch.arange(2), anchors, k), torch.ones(2)), context


def counted(work) -> float:
    with flop_counter() as counter:
        work()
    return float(counter.get_total_flops())


def test_the_flops_of_training_on_text_are_those_that_are_counted():
    config = small("quickstart", "student.design.sequential.draft_rank=0", "student.design.sequential.shortlist=0")
    _, student = models(config)
    windows, context = batch(4)
    text = TextBatch(context, windows.anchors_BW, windows.noise_BWK)
    plan = plan_run(config)[-1]
    assert (plan.steps, plan.tokens, plan.windows, plan.rollout_flops) == (2, 4 * BLOCK, 4 * WINDOWS, 0)
    assert plan.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert plan.parameters == sum(p.numel() for p in student.parameters())
    step = TextStep(student, "tv")
    assert plan.train_flops / 2 == pytest.approx(counted(lambda: step(text).loss.backward()), rel=0.2)


@pytest.mark.parametrize("name", ["toy", "paper"])
def test_the_flops_of_rolled_out_windows_are_those_that_are_counted(name):
    config = small(name, "rollout.draws=1", "rollout.teacher_top_k=none", "stages.k4.train.steps=2")
    backbone, student = models(config)
    windows, _ = batch(4)
    stage, plan = resolve(config)[-1], plan_run(config)[-1]
    teacher = ARTeacher(backbone.model, COUPLINGS[student.design.coupling])
    if stage.targets == "self":
        teacher = StudentTeacher(PushForwardLM.from_backbone(backbone.model, 2, student.design))
    targets = teacher.rollout(windows)
    assert plan.rollout_flops / 2 == pytest.approx(counted(lambda: teacher.rollout(windows)), rel=0.25)
    step = StudentStep(student, stage.loss)
    made = counted(lambda: step(WindowBatch(windows, targets)).loss.backward())
    assert plan.train_flops / 2 == pytest.approx(made, rel=0.25)


def test_the_flops_of_an_ar_model_are_those_that_are_counted():
    config = small("toy")
    step, _ = models(config)
    _, context = batch(4)
    assert plan_run(config)[0].train_flops / 2 == pytest.approx(
        counted(lambda: step(TokenBatch(context)).loss.backward()), rel=0.2
    )


def test_a_plan_names_every_stage_and_its_hours():
    config = small("toy")
    lines = describe_plan(config, 1e9).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["teacher", "k1", "k2", "k4"]
    total = sum(stage.flops for stage in plan_run(config))
    assert f"{total:.2e} FLOPs" in lines[-1]
    assert f"{total / 1e9 / 3600:.2f} hours at 1.0e+09 FLOP/s" in lines[-1]


def test_the_command_plans_without_starting_anything(tmp_path, monkeypatch, capsys):
    root = tmp_path / "run"
    words = ["distill.py", "--plan", "--recipe", "smoke", f"output_dir={root}", "--flops-per-s", "1e12"]
    monkeypatch.setattr(sys, "argv", words)
    distill.main()
    assert "hours at 1.0e+12 FLOP/s" in capsys.readouterr().out
    assert not list(root.glob("*/*"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--flops-per-s", "1e12"], "belongs to --plan"),
        (["--plan", "--flops-per-s", "0"], "give the trainers' FLOP/s"),
    ],
)
def test_a_speed_that_cannot_be_is_one_line_and_exit_code_2(monkeypatch, capsys, words, problem):
    monkeypatch.setattr(sys, "argv", ["distill.py", *words])
    with pytest.raises(SystemExit) as ended:
        distill.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --flops-per-s")
    assert problem in line
