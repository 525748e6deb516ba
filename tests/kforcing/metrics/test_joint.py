import pytest
import torch

import kforcing.metrics.joint as joint_module
from kforcing import PushForwardLM
from kforcing.coupling import inverse_cdf
from kforcing.distillation.teachers import ARTeacher
from kforcing.keys import derive_key
from kforcing.metrics.joint import (
    ar_score,
    bucket,
    divergence,
    independent,
    joint_tv,
    position_entropy,
    sample_blocks,
    student_score,
)
from tests.models import VOCAB, make_backbone, make_sequential

CONTEXT = torch.tensor([3, 1, 4, 1, 5])


def test_total_variation_of_known_samples():
    one = torch.tensor([[0, 1]] * 3 + [[2, 3]])
    other = torch.tensor([[0, 1]] + [[2, 3]] * 3)
    distinct = {tuple(bucket(row, 64).tolist()) for row in one}
    assert len(distinct) == 2
    assert joint_tv(one, other, 64) == 0.5
    assert joint_tv(one, one, 64) == 0


def test_shuffled_columns_keep_marginals_and_lose_dependence():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 40, (20_000,), generator=g)
    pairs = torch.stack([x, x], dim=1)
    loose = independent(pairs, seed=0)
    assert torch.equal(loose[:, 0].bincount(), pairs[:, 0].bincount())
    assert position_entropy(loose) == position_entropy(pairs)
    assert joint_tv(loose, pairs, 8) > 0.7
    again = torch.stack([y := torch.randint(0, 40, (20_000,), generator=g), y], dim=1)
    assert joint_tv(again, pairs, 8) < 0.03


def test_buckets_are_even():
    counts = bucket(torch.arange(50_000), 6).bincount(minlength=6)
    assert counts.min() > 8_200


def test_entropy_of_uniform_tokens():
    tokens = torch.arange(8).repeat(10)
    assert abs(position_entropy(torch.stack([tokens, tokens * 0], 1)) - torch.tensor(8.0).log().item()) < 1e-6


def test_samples_do_not_depend_on_the_batch():
    def draw(windows):
        assert (windows.anchors_BW == 4).all()
        return (windows.noise_BWK * 10).long()

    context = torch.arange(5)
    key = derive_key(0)
    one = sample_blocks(draw, context, 3, 100, key, batch=7)
    assert torch.equal(one, sample_blocks(draw, context, 3, 100, key, batch=100))
    assert one.shape == (100, 3)
    assert len(one.unique(dim=0)) > 80


def table(backbone):
    """The joint of the next two tokens, one plain forward a first token."""
    with torch.no_grad():
        rows = torch.cat([CONTEXT.repeat(VOCAB, 1), torch.arange(VOCAB)[:, None]], dim=1)
        p = backbone(input_ids=rows).logits[:, -2:].double().softmax(-1)
    return p[0, 0][:, None] * p[:, 1]


def teacher_blocks(backbone, k, samples=4096):
    return sample_blocks(ARTeacher(backbone, inverse_cdf).rollout, CONTEXT, k, samples, derive_key(0))


def test_divergence_from_an_enumerated_joint_is_that_of_the_tables():
    teacher, other = make_backbone(scale=3.0), make_backbone(seed=1, scale=3.0)
    p, q = table(teacher), table(other)
    found = divergence(ar_score(teacher), ar_score(other), CONTEXT, 2, VOCAB)
    assert found.tv == pytest.approx((p - q).abs().sum().item() / 2, rel=1e-4)
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
    product = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    assert found.independent_tv == pytest.approx((p - product).abs().sum().item() / 2, rel=1e-4)
    assert found.independent_kl == pytest.approx((p * (p / product).log()).sum().item(), rel=1e-4)


def test_the_teacher_itself_and_the_product_of_its_marginals_score_what_they_must(monkeypatch):
    teacher = make_backbone(scale=3.0)
    blocks = teacher_blocks(teacher, 2)
    exact = divergence(ar_score(teacher), ar_score(teacher), CONTEXT, blocks.shape[1], VOCAB, blocks)
    assert (exact.tv, exact.kl) == (0, 0)
    monkeypatch.setattr(joint_module, "ENUMERABLE", 0)
    estimated = divergence(ar_score(teacher), ar_score(teacher), CONTEXT, blocks.shape[1], VOCAB, blocks)
    assert (estimated.tv, estimated.kl) == (0, 0)
    assert estimated.independent_tv == pytest.approx(exact.independent_tv, abs=0.02)
    assert estimated.independent_kl == pytest.approx(exact.independent_kl, abs=0.02)
    p = table(teacher)
    product = (p.sum(1, keepdim=True) * p.sum(0, keepdim=True)).log()

    def marginals(windows, tokens):
        first = product.logsumexp(1).expand(*tokens.shape[:2], -1)
        second = product.logsumexp(0).expand(*tokens.shape[:2], -1)
        return torch.stack([first, second], dim=2)

    found = divergence(ar_score(teacher), marginals, CONTEXT, blocks.shape[1], VOCAB, blocks)
    assert found.tv == pytest.approx(exact.independent_tv, abs=0.02)
    assert found.kl == pytest.approx(exact.independent_kl, abs=0.02)


def test_estimates_agree_with_enumeration_for_a_student(monkeypatch):
    teacher = make_backbone(scale=3.0)
    student = make_sequential(make_backbone(scale=3.0))
    blocks = teacher_blocks(teacher, 2)
    exact = divergence(ar_score(teacher), student_score(student), CONTEXT, blocks.shape[1], VOCAB, blocks)
    monkeypatch.setattr(joint_module, "ENUMERABLE", 0)
    estimated = divergence(ar_score(teacher), student_score(student), CONTEXT, blocks.shape[1], VOCAB, blocks)
    assert exact.tv > 0.05
    assert estimated.tv == pytest.approx(exact.tv, abs=0.02)
    assert estimated.kl == pytest.approx(exact.kl, rel=0.05)


def test_an_argmax_student_has_no_densities():
    with pytest.raises(ValueError, match="compare samples"):
        student_score(PushForwardLM.from_backbone(make_backbone(), 2))
