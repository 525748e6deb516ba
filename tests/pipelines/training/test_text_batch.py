"""Rows of a token store as windows of the text itself."""

import numpy as np
import torch

from pipelines.data.rows import token_rows, with_place
from pipelines.training.step import text_batch

N, K, W = 12, 3, 5


def rows(epoch=0, order=(0, 1)):
    tokens = np.arange(2 * N, dtype=np.int32).reshape(2, N)[list(order)]
    seq = np.array([7, 8])[list(order)]
    return with_place(token_rows(seq, seq, tokens), np.arange(2), np.full(2, epoch))


def test_blocks_lie_inside_the_text():
    batch = text_batch(rows(), "cpu", K, W, seed=0, stage="k3")
    assert batch.tokens_BN.tolist() == np.arange(2 * N).reshape(2, N).tolist()
    assert batch.anchors_BW.shape == (2, W)
    assert batch.anchors_BW.min() >= 0
    assert batch.anchors_BW.max() + K < N
    assert (batch.anchors_BW.diff() > 0).all()
    assert batch.noise_BWK.shape == (2, W, K)


def test_all_windows_of_a_row_can_be_had():
    batch = text_batch(rows(), "cpu", K, N - K, seed=0, stage="k3")
    assert batch.anchors_BW.tolist() == [list(range(N - K))] * 2


def test_windows_follow_from_the_sequence_and_the_epoch_alone():
    one = text_batch(rows(), "cpu", K, W, seed=0, stage="k3")
    other = text_batch(rows(order=(1, 0)), "cpu", K, W, seed=0, stage="k3")
    assert torch.equal(one.anchors_BW, other.anchors_BW.flip(0))
    assert torch.equal(one.noise_BWK, other.noise_BWK.flip(0))
    later = text_batch(rows(epoch=1), "cpu", K, W, seed=0, stage="k3")
    assert not torch.equal(one.anchors_BW, later.anchors_BW)
