import dataclasses

import pytest

from pipelines.config.schema import TrainConfig
from pipelines.training.schedule import ema_decay, learning_rate, on_policy_fraction

TRAIN = TrainConfig(steps=100, lr=1.0, warmup=10, schedule="cosine")


def test_the_learning_rate_warms_up_and_then_follows_its_schedule():
    lrs = [learning_rate(s, TRAIN) for s in range(100)]
    assert lrs[0] == pytest.approx(0.1)
    assert lrs[9] == pytest.approx(1.0)
    assert lrs[10] == pytest.approx(1.0)
    assert lrs[55] == pytest.approx(0.55)
    assert lrs[99] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(99, dataclasses.replace(TRAIN, schedule="constant")) == 1.0


def test_the_decay_of_the_average_grows_to_its_limit():
    assert [ema_decay(step, 0.9) for step in (0, 8, 80, 81, 1000)] == [0.1, 0.5, 0.9, 0.9, 0.9]


def test_the_on_policy_fraction_is_zero_before_its_first_step():
    train = dataclasses.replace(TRAIN, on_policy_fraction=0.25, on_policy_from=0.5)
    assert [on_policy_fraction(step, train) for step in (0, 49, 50, 99)] == [0.0, 0.0, 0.25, 0.25]
