import math

import pytest

from pipelines.config.schema import TrainConfig
from pipelines.training.guard import Diverged, StepFigures, explain

NAN, INF = math.nan, math.inf


def test_finite_figures_and_a_loss_at_the_limit_are_good():
    StepFigures(loss=100.0, gradient=1e30, weights=1e30).check(100.0)


@pytest.mark.parametrize(
    ("figures", "cause"),
    [
        (StepFigures(NAN, 1.0, 1.0), "the loss is nan"),
        (StepFigures(INF, 1.0, 1.0), "the loss is inf"),
        (StepFigures(100.5, 1.0, 1.0), r"the loss has exploded to 100.5 nats a token \(train.max_loss=100\)"),
        (StepFigures(1.0, NAN, 1.0), "the gradient is not finite"),
        (StepFigures(1.0, -1.0, 1.0), "the gradient is not finite"),
        (StepFigures(1.0, 1.0, NAN), "weights that are not finite"),
    ],
)
def test_each_figure_that_shows_a_broken_step_is_named(figures, cause):
    with pytest.raises(Diverged, match=cause):
        figures.check(100.0)


def test_the_line_names_step_rows_and_the_last_good_checkpoint():
    line = explain(Diverged("the loss is nan"), 9, TrainConfig(batch=16, steps=50), ("/store", 7), "/run/step-00000005")
    assert "diverged in step 10 of 50: the loss is nan. Nothing was exported." in line
    assert "The step was fed rows 144 to 159 of /store in the order of seed 7." in line
    assert "The last good checkpoint is /run/step-00000005." in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "Lower this stage's train.lr (it is 0.001), and run"),
        ({"clip": 0.0}, "Lower this stage's train.lr (it is 0.001) or set its train.clip=1 (it is 0), and run"),
        ({"precision": "bf16"}, "(it is 0.001) or set its train.precision=fp32 (it is bf16), and run"),
    ],
)
def test_the_advice_names_only_settings_that_can_change_something(settings, advice):
    line = explain(Diverged("the loss is nan"), 9, TrainConfig(**settings), ("/store", 7), None)
    assert advice in line
    assert line.endswith("with other settings the stage starts at step 1")
