import pytest
import torch

from kforcing.distillation.losses import SoftTargets, block_sums, hard_target_loss, next_token_loss, soft_target_kl
from tests.models import VOCAB, make_backbone


def test_hard_target_loss_sums_by_offset():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    logits = p.log()[None, None].expand(2, 1, 2, 3)
    targets = torch.tensor([[[0, 1]], [[2, 1]]])
    sums = hard_target_loss(torch.nn.Identity(), logits, targets)
    expected = -torch.log(torch.tensor([0.5 * 0.25, 0.8 * 0.8]))
    torch.testing.assert_close(sums.nll_K, expected)
    assert sums.loss.item() == pytest.approx(expected.sum().item())
    assert sums.match_K.tolist() == [1, 2]
    assert sums.block.item() == 1
    assert (sums.windows, sums.tokens) == (2, 4)
    twice = sums + sums
    assert (twice.windows, twice.match_K.tolist()) == (4, [2, 4])


def test_next_token_loss_is_the_transformers_loss():
    backbone = make_backbone()
    ids = torch.randint(0, VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    sums = next_token_loss(backbone, ids)
    assert sums.tokens == 27
    assert (sums.loss / sums.tokens).item() == pytest.approx(backbone(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def distributions(B=2, W=3, K=2, V=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, W, K, V, generator=g)


def test_soft_target_kl_is_the_divergence():
    teacher, student = distributions()
    p, q = torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    expected = torch.distributions.kl_divergence(p, q)
    logp = teacher.log_softmax(-1)
    torch.testing.assert_close(soft_target_kl(student, SoftTargets(logp)), expected)
    every = logp.topk(7, dim=-1)
    torch.testing.assert_close(
        soft_target_kl(student, SoftTargets(every.values, every.indices)), expected, atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(soft_target_kl(teacher, SoftTargets(logp)), torch.zeros(2, 3, 2), atol=1e-6, rtol=0)


def test_a_truncated_target_is_the_divergence_of_the_lumped_distributions():
    teacher, student = distributions(seed=1)
    best = teacher.log_softmax(-1).topk(3, dim=-1)
    soft = SoftTargets(best.values, best.indices)

    def lump(logits):
        p = logits.softmax(-1)
        top = p.gather(-1, best.indices)
        return torch.distributions.Categorical(probs=torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1))

    kl = soft_target_kl(student, soft)
    torch.testing.assert_close(
        kl, torch.distributions.kl_divergence(lump(teacher), lump(student)), atol=1e-5, rtol=1e-4
    )
    assert (kl <= soft_target_kl(student, SoftTargets(teacher.log_softmax(-1))) + 1e-6).all()
    torch.testing.assert_close(soft.tail_BWK, 1 - teacher.softmax(-1).gather(-1, best.indices).sum(-1))


def test_the_gradient_raises_tokens_of_the_tail_that_the_student_has_lost():
    """The student has all but left out what the labels lump together: its logits must still rise."""
    teacher = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    student = torch.tensor([0.0, 0.0, -30.0, -30.0], requires_grad=True)
    soft = SoftTargets(teacher[None, None, None, :2], torch.tensor([[[[0, 1]]]]))
    kl = soft_target_kl(student[None, None, None], soft).sum()
    kl.backward()
    assert kl.item() > 5
    assert (student.grad[2:] < -0.05).all()
    assert (student.grad[:2] > 0).any()


def test_matches_that_were_counted_on_some_windows_are_scaled_up_to_all():
    nll = torch.ones(2, 4, 3)
    right = torch.tensor([[[1, 1, 1]], [[1, 0, 1]]]).bool()
    sums = block_sums(nll.sum(), 8, right, nll)
    assert sums.match_K.tolist() == [8, 4, 8]
    assert (sums.block.item(), sums.windows, sums.nll_K.tolist()) == (4, 8, [8, 8, 8])
