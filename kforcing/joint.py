"""Is the joint distribution of k tokens right? Samples of one context's next k tokens, compared in hashed buckets.

joint_tv      total variation between two samples' histograms over buckets of blocks. Two samples of the *same*
              distribution do not score 0 but a floor that depends on their size: it is measured, not assumed
independent   the teacher's samples with every offset shuffled by itself: what ignoring dependence would score
entropy       of each offset's marginal, summed: a sampler that has moved towards modes loses it
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kforcing.noise import uniform
from kforcing.staircase import Windows


def sample_blocks(
    draw: Callable[[Windows], Tensor], context_N: Tensor, k: int, samples: int, key: int, batch: int = 256
) -> Tensor:
    """(samples, k) int64 blocks that follow a context, each from noise of its own.

    Args:
        draw: windows → (1, W, k) tokens.
        context_N: int64.
        key: of the noise (`derive_key`); the same key gives every sampler the same noise.
        batch: windows of one call.
    """
    blocks = []
    offsets = torch.arange(k, device=context_N.device)
    sequence = torch.zeros(1, dtype=torch.int64, device=context_N.device)
    for numbers in torch.arange(samples, device=context_N.device).split(batch):
        noise = uniform(key, sequence, numbers[:, None], offsets)[None]
        anchors = torch.full((1, len(numbers)), len(context_N) - 1, device=context_N.device)
        windows = Windows(context_N[None], anchors, noise, torch.ones(1, device=context_N.device))
        blocks.append(draw(windows)[0])
    return torch.cat(blocks)


def bucket(tokens: Tensor, buckets: int) -> Tensor:
    """Token ids → buckets by a fixed multiplicative hash (Knuth's), so that neighbours in the vocabulary spread."""
    return (tokens * 2654435761 % 2**32 * buckets) >> 32


def joint_tv(one_SK: Tensor, other_SK: Tensor, buckets: int) -> float:
    """Total variation of two samples' histograms over bucketsᴷ cells; in [0, 1]."""
    place_K = buckets ** torch.arange(one_SK.shape[1], device=one_SK.device)
    cells = buckets ** one_SK.shape[1]
    shares = [
        torch.bincount((bucket(s, buckets) * place_K).sum(1), minlength=cells).double() / len(s)
        for s in (one_SK, other_SK)
    ]
    return (shares[0] - shares[1]).abs().sum().item() / 2


def independent(blocks_SK: Tensor, seed: int) -> Tensor:
    """The same marginals without dependence: every column permuted by itself."""
    generator = torch.Generator().manual_seed(seed)
    columns = [column[torch.randperm(len(column), generator=generator)] for column in blocks_SK.cpu().T]
    return torch.stack(columns, dim=1).to(blocks_SK.device)


def position_entropy(blocks_SK: Tensor) -> float:
    """Sum over offsets of the entropy of the sampled marginal, in nats (plug-in: compare samples of one size)."""
    total = 0.0
    for column in blocks_SK.T:
        p = column.unique(return_counts=True)[1].double() / len(column)
        total -= (p * p.log()).sum().item()
    return total
