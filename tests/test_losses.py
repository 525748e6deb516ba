import pytest
import torch

from kforcing.losses import hard_target_loss, next_token_loss
from tests.conftest import VOCAB, make_backbone


def test_hard_target_loss_sums_by_offset():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    logits = p.log()[None, None].expand(2, 1, 2, 3)
    targets = torch.tensor([[[0, 1]], [[2, 1]]])
    sums = hard_target_loss(logits, targets)
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
