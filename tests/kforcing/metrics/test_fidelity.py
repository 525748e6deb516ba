from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from kforcing import Design
from kforcing.attention.windows import Windows
from kforcing.coupling import inverse_cdf
from kforcing.distillation.teachers import ARTeacher
from kforcing.keys import derive_key
from kforcing.metrics.fidelity import window_scores
from kforcing.metrics.intervals import Interval, cluster_bootstrap, over_clusters
from kforcing.noise import sample_anchors, window_noise
from kforcing.readout.base import BlockScores
from tests.models import VOCAB, make_backbone


class UnrolledTeacher:
    """The ideal student: it knows the teacher's own coupled tokens."""

    config = SimpleNamespace(design=Design())

    def __init__(self, backbone):
        self.backbone, self.teacher = backbone, ARTeacher(backbone, inverse_cdf)

    def tokens(self, windows, context):
        return self.teacher.rollout(windows, context)

    def scores(self, windows, tokens, context):
        return BlockScores(one_hot(self.tokens(windows, context), VOCAB).float() * 100, torch.nn.Identity())


def windows():
    context = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    seq = torch.arange(4)
    anchors = sample_anchors(derive_key(0), seq, 12, 6)
    return Windows(context, anchors, window_noise(derive_key(1), seq, anchors, 3), torch.ones(4))


def test_the_unrolled_teacher_as_student_is_perfect():
    backbone = make_backbone()
    scores = window_scores(UnrolledTeacher(backbone), backbone, windows())
    assert scores.match.all()
    torch.testing.assert_close(scores.student_nll, scores.teacher_nll)
    assert scores.target_nll.max() < 1e-6


def test_a_student_that_repeats_one_token_is_scored_as_such():
    backbone = make_backbone()
    stuck = UnrolledTeacher(backbone)
    stuck.tokens = lambda w, context: torch.full(w.noise_BWK.shape, 5)
    w = windows()
    scores = window_scores(stuck, backbone, w)
    assert torch.equal(scores.match, ARTeacher(backbone, inverse_cdf).rollout(w) == 5)
    row = torch.cat([w.context_BN[2, : w.anchors_BW[2, 4] + 1], torch.tensor([5, 5, 5])])[None]
    with torch.no_grad():
        expected = -backbone(input_ids=row).logits[0].log_softmax(-1)[-4:-1, 5]
    torch.testing.assert_close(scores.student_nll[2, 4], expected, rtol=1e-4, atol=1e-4)


def test_bootstrap_value_is_the_ratio_and_the_interval_is_over_clusters():
    sums, counts = np.array([[8.0], [1.0], [3.0]]), np.array([10.0, 5.0, 5.0])
    (figure,) = cluster_bootstrap(sums, counts, draws=2000, seed=0)
    assert figure.value == 0.6
    assert figure.lo == 0.2  # the worst cluster three times
    assert figure.hi == 0.8
    same = cluster_bootstrap(sums, counts, draws=2000, seed=0)
    assert same == [figure]


def test_two_clusters_give_no_better_interval_than_their_means_and_none_varies_when_all_are_equal():
    apart, equal = cluster_bootstrap(np.array([[1.0, 3.0], [4.0, 6.0]]), np.array([1.0, 2.0]), draws=500, seed=0)
    assert (apart.lo, apart.hi) == (1.0, 2.0)
    assert equal.lo == pytest.approx(3.0)
    assert equal.hi == pytest.approx(3.0)


def rates(rng, counts):
    """Shares whose documents differ: mean 0.6."""
    return rng.binomial(counts, rng.beta(6, 4, len(counts))).astype(float)


def nats(rng, counts):
    """Skewed sums whose documents differ: mean 2.7 a token."""
    return rng.gamma(counts, rng.gamma(9, 0.3, len(counts)))


@pytest.mark.long
@pytest.mark.parametrize("documents", [30, 60])
@pytest.mark.parametrize(("draw", "truth"), [(rates, 0.6), (nats, 2.7)])
def test_intervals_cover_the_truth(draw, truth, documents):
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(500):
        counts = rng.integers(40, 120, documents)
        (figure,) = cluster_bootstrap(draw(rng, counts)[:, None], counts.astype(float), draws=400, seed=trial)
        covered += figure.lo <= truth <= figure.hi
    assert 0.93 <= covered / 500 <= 0.97


def test_items_count_with_the_cluster_they_belong_to():
    sums, counts = np.array([[5.0], [3.0], [1.0], [3.0], [9.0]]), np.array([6.0, 4.0, 5.0, 5.0, 0.0])
    found = over_clusters(sums, counts, ["a", "a", "b", "c", "d"], draws=500, seed=0)
    assert found == cluster_bootstrap(np.array([[8.0], [1.0], [3.0]]), np.array([10.0, 5.0, 5.0]), 500, 0)
    assert over_clusters(sums, 0 * counts, list("aabcd"), 10, 0) is None
    assert over_clusters(sums, counts, ["a"] * 5, 10, 0) == [Interval(0.6, None, None)]
