"""A rollout actor by itself: what its rows hold, and how many it makes at once."""

import numpy as np
import pytest
import torch

from kforcing import Design
from kforcing.attention.windows import Windows
from kforcing.coupling import inverse_cdf
from kforcing.design import NoiseConfig
from kforcing.distillation.teachers import ARTeacher
from pipelines.data.rows import rollout_cost, token_rows, with_place
from pipelines.rollouts.actor import CPU_BATCH, RolloutActor, fitting_batch, pass_bytes
from pipelines.rollouts.plan import RolloutJob
from pipelines.training.step import to_batch
from tests.models import VOCAB, make_backbone

N = 12


@pytest.fixture
def actor(tmp_path):
    make_backbone().save_pretrained(tmp_path)

    def make(windows=5, batch=None, draws=1):
        design = Design(noise=NoiseConfig(temperature_min=0.5, temperature_max=2.0))
        return RolloutActor(RolloutJob(str(tmp_path), True, 2, windows, 0, "k2", design, None, batch, 1, draws))

    return make


def rows(n):
    tokens, numbers = np.random.default_rng(0).integers(0, VOCAB, (n, N)), np.arange(n)
    return with_place(token_rows(numbers, numbers, tokens), numbers, np.zeros(n, np.int64))


def test_training_sees_the_noise_and_anchors_that_targets_were_made_of(actor):
    batch = to_batch(actor()(rows(4)), "cpu")
    teacher = ARTeacher(make_backbone(), inverse_cdf)
    assert torch.equal(teacher.rollout(batch.windows), batch.targets_BWK)
    assert batch.windows.temperature_B.unique().numel() == 4


def test_draws_are_further_windows_of_the_same_anchors(actor):
    once, thrice = (to_batch(actor(draws=d)(rows(4)), "cpu") for d in (1, 3))
    assert torch.equal(thrice.windows.anchors_BW, once.windows.anchors_BW.repeat_interleave(3, dim=1))
    assert torch.equal(thrice.windows.noise_BWK[:, ::3], once.windows.noise_BWK)
    assert torch.equal(thrice.targets_BWK[:, ::3], once.targets_BWK)
    assert thrice.windows.noise_BWK.unique().numel() == 4 * 5 * 3 * 2
    w = thrice.windows
    part = Windows(w.context_BN, w.anchors_BW[:, 1::3], w.noise_BWK[:, 1::3], w.temperature_B)
    assert torch.equal(ARTeacher(make_backbone(), inverse_cdf).rollout(part), thrice.targets_BWK[:, 1::3])


def test_the_cost_of_a_rollout_comes_with_its_rows(actor):
    rolled = actor(batch=2)(rows(3))
    cost = rollout_cost(rolled)
    assert cost["rollout_s"] > 0
    assert cost["rollout_rss_mb"] > 1
    assert set(cost) == {"rollout_s", "rollout_rss_mb", "rollout_gpu_mb"}
    assert not set(cost) & set(rolled.column_names)


def test_rows_do_not_depend_on_how_many_are_made_at_once(actor):
    tables = [actor(batch=batch)(rows(CPU_BATCH + 3)) for batch in (None, 2)]
    assert tables[0].equals(tables[1])


def test_a_batch_fills_half_of_the_free_memory():
    assert [fitting_batch(free, 100) for free in (0, 399, 400, 900, 1600, 10**9)] == [1, 1, 2, 4, 8, 1024]
    backbone = make_backbone()  # 2 layers of 2 key heads of width 4, width 16
    assert pass_bytes(backbone, context=10, entries=6) == 4 * 16 * (2 * 2 * 2 * 4 + 12 * 16)
    assert pass_bytes(backbone.bfloat16(), 10, 6) == 2 * 16 * (2 * 2 * 2 * 4 + 12 * 16)
