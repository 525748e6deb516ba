"""How far the joint distribution of a sampler's next k tokens is from the teacher's.

Some samplers have known probabilities (AR models, and students whose logits are distributions). For them:

divergence    total variation and KL divergence from the teacher's exact joint distribution. All blocks are enumerated
              where this is possible. Otherwise the figures are unbiased estimates from blocks of the teacher and the exact
              densities of both. The independent figures belong to a sampler with the teacher's marginals and no dependence

Other samplers have none (an argmax student maps noise to tokens). They are compared by samples of the next k tokens after
one context, in hashed buckets:

joint_tv      total variation between the histograms of two samples. Two samples of the *same* distribution do not score 0
              but a floor that depends on their size; measure the floor with a second sample of the teacher
independent   the teacher's samples with each offset shuffled on its own: the score of a sampler without dependence
entropy       sum of the entropies of the offsets' marginals; it falls when a sampler moves towards modes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.attention.reader import ar_block_logits
from kforcing.attention.windows import Windows, read_context
from kforcing.modeling import PushForwardLM
from kforcing.noise import uniform

Score = Callable[[Windows, Tensor], Tensor]
"""Windows and (1, W, K) blocks → (1, W, K, V) float32 logits of each token given those before it."""

ENUMERABLE = 2**20
"""Largest number of blocks that are enumerated."""


def sample_blocks(
    draw: Callable[[Windows], Tensor], context_N: Tensor, k: int, samples: int, key: int, batch: int = 256
) -> Tensor:
    """(samples, k) int64 blocks that follow a context, each made from its own noise.

    Args:
        draw: windows → (1, W, k) tokens.
        context_N: int64.
        key: of the noise (`derive_key`); the same key gives every sampler the same noise.
        batch: windows of one call of `draw`.
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
    """Token ids → buckets by Knuth's multiplicative hash, which puts neighbours in the vocabulary into different buckets."""
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
    """Blocks with the same marginals and no dependence: every column is permuted on its own."""
    generator = torch.Generator().manual_seed(seed)
    columns = [column[torch.randperm(len(column), generator=generator)] for column in blocks_SK.cpu().T]
    return torch.stack(columns, dim=1).to(blocks_SK.device)


def position_entropy(blocks_SK: Tensor) -> float:
    """Sum over offsets of the entropy of the sampled marginal, in nats. Compare samples of the same size only."""
    total = 0.0
    for column in blocks_SK.T:
        p = column.unique(return_counts=True)[1].double() / len(column)
        total -= (p * p.log()).sum().item()
    return total


def ar_score(backbone: PreTrainedModel) -> Score:
    """The AR model's distributions as a `Score`."""
    return lambda w, tokens: ar_block_logits(backbone, read_context(backbone, w.context_BN), w.anchors_BW, tokens)


def student_score(student: PushForwardLM) -> Score:
    """A student's distributions as a `Score`. Raises ValueError for an argmax student, whose logits are no distributions."""
    if not student.config.design.conditional:
        raise ValueError("an argmax student's logits are no distributions given the tokens before; compare samples")
    return lambda w, tokens: student.scores(w, tokens).logits_BWKV.float()


@dataclass(frozen=True)
class Divergence:
    """Divergence from the teacher's joint distribution to a sampler's, after one context."""

    tv: float
    kl: float
    """Nats."""
    independent_tv: float
    """The total variation of the product of the teacher's own marginals."""
    independent_kl: float


def enumerable(vocabulary: int, k: int) -> bool:
    """Whether there are few enough blocks of k tokens to enumerate them."""
    return vocabulary**k <= ENUMERABLE


@torch.inference_mode()
def divergence(
    teacher: Score, student: Score, context_N: Tensor, k: int, vocabulary: int, blocks_SK: Tensor | None = None
) -> Divergence:
    """Divergence between two samplers: exact where blocks of k tokens are `enumerable`, else an estimate from blocks.

    Args:
        context_N: int64.
        vocabulary: V.
        blocks_SK: int64 blocks that the teacher drew after the context. An estimate needs them.
    Raises:
        ValueError: when an estimate is needed and there are no blocks.
    """
    if enumerable(vocabulary, k):
        p, q = (exact_joint(score, context_N, k, vocabulary) for score in (teacher, student))
        return Divergence(_tv(p, q), _kl(p, q), _tv(p, m := _product_of_marginals(p)), _kl(p, m))
    if blocks_SK is None:
        raise ValueError(f"{vocabulary}^{k} blocks are too many to enumerate; give blocks that the teacher drew")
    return _estimated(teacher, student, context_N, blocks_SK)


def _logp(score: Score, context_N: Tensor, blocks_SK: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(b, K) blocks and (b, K, V) float64 log-probabilities of their tokens, batch by batch."""
    for some_SK in blocks_SK.split(batch):
        anchors = torch.full((1, len(some_SK)), len(context_N) - 1, device=context_N.device)
        noise = torch.full((1, *some_SK.shape), 0.5, dtype=torch.float64, device=context_N.device)
        windows = Windows(context_N[None], anchors, noise, torch.ones(1, device=context_N.device))
        yield some_SK, score(windows, some_SK[None])[0].double().log_softmax(-1)


@torch.inference_mode()
def exact_joint(score: Score, context_N: Tensor, k: int, vocabulary: int) -> Tensor:
    """Probabilities of all blocks of k tokens after a context, float64: a tensor with k dimensions of size V."""
    ids = [torch.arange(vocabulary, device=context_N.device)] * (k - 1) + [
        torch.zeros(1, dtype=torch.int64, device=context_N.device)
    ]
    prefixes = torch.cartesian_prod(*ids).view(-1, k)
    logp = torch.cat([part for _, part in _logp(score, context_N, prefixes, 256)])  # (V^(k-1), k, V)
    before = logp[:, :-1].gather(-1, prefixes[:, :-1, None]).sum((1, 2))
    return (before[:, None] + logp[:, -1]).exp().view((vocabulary,) * k)


def _product_of_marginals(p: Tensor) -> Tensor:
    product = torch.ones_like(p)
    for i in range(p.ndim):
        others = [j for j in range(p.ndim) if j != i]
        product = product * (p.sum(others, keepdim=True) if others else p)
    return product


def _tv(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum().item() / 2


def _kl(p: Tensor, q: Tensor) -> float:
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum().item()


def _estimated(teacher: Score, student: Score, context_N: Tensor, blocks_SK: Tensor) -> Divergence:
    """TV = E_p[max(0, 1 − q/p)]; KL as the sum over tokens of KL between whole distributions along the teacher's blocks.

    The marginals are averages of the teacher's conditionals over one half of the blocks and are used on the other half.
    """
    S, K = blocks_SK.shape
    batch = min(256, max(1, S // 2))
    log_p, log_q, kl, sums = [], [], 0.0, []
    drawn = zip(_logp(teacher, context_N, blocks_SK, batch), _logp(student, context_N, blocks_SK, batch), strict=True)
    for (blocks, p), (_, q) in drawn:
        log_p.append(p.gather(-1, blocks[..., None]).sum((1, 2)))
        log_q.append(q.gather(-1, blocks[..., None]).sum((1, 2)))
        kl += (p.exp() * (p - q)).sum().item() / S
        sums.append(p.exp().sum(0))
    half = max(1, len(sums) // 2)
    ends = (sum(sums[half:], torch.zeros_like(sums[0])), sum(sums[:half], torch.zeros_like(sums[0])))
    log_m = []
    for i, blocks in enumerate(blocks_SK.split(batch)):
        marginal_KV = ends[0] if i < half else ends[1]
        marginal_KV = marginal_KV / marginal_KV.sum(-1, keepdim=True)
        log_m.append(marginal_KV[torch.arange(K, device=blocks.device), blocks].log().sum(-1))
    p, q, m = torch.cat(log_p), torch.cat(log_q), torch.cat(log_m)

    def tv(other: Tensor) -> float:
        return (1 - (other - p).exp()).clamp(min=0).mean().item()

    return Divergence(tv(q), kl, tv(m), (p - m).mean().item())
