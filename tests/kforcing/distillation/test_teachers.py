import itertools

import pytest
import torch
from scipy import stats

from kforcing.attention.reader import ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.coupling import gumbel_max, inverse_cdf
from kforcing.distillation.teachers import ARTeacher
from kforcing.keys import derive_key
from kforcing.noise import uniform
from tests.models import VOCAB, make_backbone


def exact_joint(backbone, context, k):
    """p(y_1..y_k | context) by enumeration: (V**k,) float64."""
    blocks = torch.tensor(list(itertools.product(range(VOCAB), repeat=k)))
    rows = blocks[None]
    anchors = torch.full((1, len(blocks)), context.shape[1] - 1)
    logits = ar_block_logits(backbone, read_context(backbone, context), anchors, rows)
    return logits.double().log_softmax(-1).gather(-1, rows[..., None]).sum((2, 3))[0].exp()


def roll(backbone, context, z, coupling=inverse_cdf):
    anchors = torch.full((1, len(z)), context.shape[1] - 1)
    return ARTeacher(backbone, coupling).rollout(Windows(context, anchors, z[None], torch.ones(1)))[0]


@pytest.mark.parametrize("coupling", [inverse_cdf, gumbel_max])
def test_unrolled_coupling_samples_the_joint(coupling):
    backbone = make_backbone(scale=4.0)
    context = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        joint = exact_joint(backbone, context, 2)
    n = 40_000
    z = uniform(derive_key(0), torch.arange(n)[:, None], 0, torch.arange(2))
    tokens = torch.cat([roll(backbone, context, part, coupling) for part in z.split(500)])
    counts = torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2).double()
    assert joint.min() * n > 5  # enough of every block for the chi-square
    assert stats.chisquare(counts.numpy(), (joint / joint.sum() * n).numpy()).pvalue > 1e-3


def test_the_volume_of_noise_that_maps_to_a_block_is_its_probability():
    """Exactness without sampling: on an even grid of z_1 × z_2 the share of each block is its probability."""
    backbone = make_backbone(scale=4.0)
    context = torch.tensor([[2, 7, 1]])
    with torch.no_grad():
        joint = exact_joint(backbone, context, 2)
    axis = (torch.arange(120, dtype=torch.float64) + 0.5) / 120
    z = torch.cartesian_prod(axis, axis)
    tokens = torch.cat([roll(backbone, context, part) for part in z.split(800)])
    share = torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2) / len(z)
    assert (share - joint).abs().sum() / 2 < 0.1  # each block's edges are off by at most a grid cell
    first = share.view(VOCAB, VOCAB).sum(1) - joint.view(VOCAB, VOCAB).sum(1)
    assert first.abs().max() < 1 / 120


def test_rollouts_do_not_depend_on_the_batch():
    backbone = make_backbone()
    context = torch.randint(0, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[0, 3, 7]]).expand(4, 3)
    z = uniform(derive_key(1), torch.arange(4)[:, None, None], anchors[..., None], torch.arange(3))
    teacher = ARTeacher(backbone, inverse_cdf)
    windows = Windows(context, anchors, z, torch.ones(4))
    whole = teacher.rollout(windows)
    for b in range(4):
        one = teacher.rollout(windows.rows(torch.tensor([b])))
        assert torch.equal(one[0], whole[b])


def test_temperature_reaches_the_teacher():
    backbone = make_backbone(scale=4.0)
    context = torch.zeros(1, 4, dtype=torch.int64)
    z = uniform(derive_key(2), torch.arange(400)[:, None], 0, torch.arange(2))[None]
    anchors = torch.full((1, 400), 3)
    teacher = ARTeacher(backbone, inverse_cdf)
    cold = teacher.rollout(Windows(context, anchors, z, torch.tensor([1e-3])))
    with torch.no_grad():
        greedy = backbone(input_ids=context).logits[0, -1].argmax()
    assert (cold[..., 0] == greedy).all()
    warm = teacher.rollout(Windows(context, anchors, z, torch.tensor([1.0])))
    assert warm[..., 0].unique().numel() > 3
