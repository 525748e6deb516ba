"""Losses, summed over tokens: whoever calls divides by the *global* token count (see `pipelines/step.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from kforcing.staircase import lm_head


@dataclass
class LossSums:
    """Sums over the tokens of a batch, so that they add up over micro-batches and ranks."""

    loss: Tensor
    """Scalar with gradient: what is minimised."""
    nll_K: Tensor
    """(K,) Σ over windows of −log p_j(target_j), no gradient."""
    match_K: Tensor
    """(K,) number of windows whose token at offset j is the target."""
    block: Tensor
    """Scalar: number of windows with every offset right."""
    windows: int
    """Number of windows (sequence positions for AR training)."""

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.loss + other.loss,
            self.nll_K + other.nll_K,
            self.match_K + other.match_K,
            self.block + other.block,
            self.windows + other.windows,
        )

    @property
    def tokens(self) -> int:
        """Number of target tokens in the sums."""
        return self.windows * len(self.nll_K)


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's distribution at each offset of each window, whole or its m likeliest tokens."""

    logp_BWKM: Tensor
    """float32 log-probabilities: of the whole vocabulary in order, or of the tokens in `ids_BWKM`."""
    ids_BWKM: Tensor | None = None
    """int64 token ids; none when the distribution is whole."""

    def after_first(self) -> SoftTargets:
        """The distributions of all offsets but the first."""
        return SoftTargets(self.logp_BWKM[:, :, 1:], None if self.ids_BWKM is None else self.ids_BWKM[:, :, 1:])

    @property
    def tail_BWK(self) -> Tensor:
        """Probability that the labels leave out: one tail for all other tokens."""
        if self.ids_BWKM is None:
            return torch.zeros_like(self.logp_BWKM[..., 0])
        return (1 - self.logp_BWKM.exp().sum(dim=-1)).clamp(min=0)


def target_nll(logits_BWKV: Tensor, targets_BWK: Tensor) -> Tensor:
    """(B, W, K) float32 −log p_j(target_j)."""
    flat = cross_entropy(logits_BWKV.float().flatten(0, -2), targets_BWK.flatten(), reduction="none")
    return flat.view(targets_BWK.shape)


def soft_target_kl(logits_BWKV: Tensor, soft: SoftTargets) -> Tensor:
    """(B, W, K) float32 KL divergence from the teacher's distribution to the student's, in nats.

    With m tokens and a tail it is the divergence of the two (m + 1)-way distributions: at most the whole one, by what
    the student could still misplace inside the tail.
    """
    logq = logits_BWKV.float().log_softmax(dim=-1)
    p = soft.logp_BWKM.exp()
    if soft.ids_BWKM is None:
        return (p * (soft.logp_BWKM - logq)).sum(dim=-1)
    divergence = (p * (soft.logp_BWKM - logq.gather(-1, soft.ids_BWKM))).sum(dim=-1)
    if soft.ids_BWKM.shape[-1] == logq.shape[-1]:
        return divergence
    tail_p, tail_logq = soft.tail_BWK, logq.scatter(-1, soft.ids_BWKM, -torch.inf).logsumexp(dim=-1)
    return divergence + torch.special.xlogy(tail_p, tail_p) - tail_p * tail_logq


@torch.no_grad()
def block_sums(loss: Tensor, windows: int, right_RK: Tensor, nll_RK: Tensor) -> LossSums:
    """The sums of so many windows, of which match and NLL were measured on some: those stand for all."""
    right, nll = right_RK.flatten(0, -2).float(), nll_RK.flatten(0, -2)
    share = windows / len(right)
    block = right.prod(-1).sum() * share
    return LossSums(loss, nll.sum(0) * (windows / len(nll)), right.sum(0) * share, block, windows)


def hard_target_loss(logits_BWKV: Tensor, targets_BWK: Tensor) -> LossSums:
    """−log p_j(target_j) in float32, summed over batch, windows and offsets (K-Forcing's training loss)."""
    nll_BWK = target_nll(logits_BWKV, targets_BWK)
    right_BWK = logits_BWKV.argmax(dim=-1) == targets_BWK
    return block_sums(nll_BWK.sum(), nll_BWK[..., 0].numel(), right_BWK, nll_BWK)


def next_token_loss(backbone: PreTrainedModel, context_BN: Tensor) -> LossSums:
    """The AR model's next-token loss on packed blocks (its training loss as the pipeline's first stage)."""
    states = backbone.base_model(input_ids=context_BN, use_cache=False).last_hidden_state
    logits = lm_head(backbone, states[:, :-1])
    return hard_target_loss(logits[:, :, None], context_BN[:, 1:, None])
