"""Losses, summed over tokens. The caller divides by the *global* number of tokens, as `pipelines/training/step.py` does.

Shapes: B batch, W windows, R rows (windows of all sequences in a line), K tokens of a block, M tokens of a label, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from kforcing.backbone import head
from kforcing.chunking import CHUNK, in_chunks, loss_in_chunks


@dataclass
class LossSums:
    """Sums over the tokens of a batch, so that they add up over micro-batches and ranks."""

    loss: Tensor
    """Scalar with gradient, which training minimises."""
    nll_K: Tensor
    """(K,) Σ over windows of −log p_j(target_j), without gradient."""
    match_K: Tensor
    """(K,) number of windows whose token at offset j is the target."""
    block: Tensor
    """Scalar: number of windows in which the token of every offset is the target."""
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
    """int64 token ids; None when the distribution is whole."""

    def rows(self, rows: slice) -> SoftTargets:
        """The targets of a slice of the windows, where the windows of all sequences are numbered in a row: (1, R, K, M)."""
        parts = (None if x is None else x.flatten(0, 1)[None, rows] for x in (self.logp_BWKM, self.ids_BWKM))
        return SoftTargets(*parts)  # type: ignore[arg-type]

    def after_first(self) -> SoftTargets:
        """The distributions of all offsets but the first."""
        return SoftTargets(self.logp_BWKM[:, :, 1:], None if self.ids_BWKM is None else self.ids_BWKM[:, :, 1:])

    @property
    def tail_BWK(self) -> Tensor:
        """The probability of all tokens that have no label."""
        if self.ids_BWKM is None:
            return torch.zeros_like(self.logp_BWKM[..., 0])
        return (1 - self.logp_BWKM.exp().sum(dim=-1)).clamp(min=0)


def target_nll(logits_BWKV: Tensor, targets_BWK: Tensor) -> Tensor:
    """(B, W, K) float32 −log p_j(target_j)."""
    nll = cross_entropy(logits_BWKV.float().flatten(0, -2), targets_BWK.flatten(), reduction="none")
    return nll.view(targets_BWK.shape)


@torch.no_grad()
def token_nll(head: Callable[[Tensor], Tensor], states_BWKD: Tensor, tokens_BWK: Tensor, chunk: int = CHUNK) -> Tensor:
    """(B, W, K) float32 −log p_j(token_j) of states before the LM head, without gradients."""
    states_RD, tokens_R = states_BWKD.flatten(0, 2), tokens_BWK.flatten()
    (nll_R,) = in_chunks(lambda rows: (target_nll(head(states_RD[rows]), tokens_R[rows]),), len(tokens_R), chunk)
    return nll_R.view(tokens_BWK.shape)


def soft_target_kl(logits_BWKV: Tensor, soft: SoftTargets) -> Tensor:
    """(B, W, K) float32 KL divergence from the teacher's distribution to the student's, in nats.

    With m labelled tokens and a tail, it is the divergence between two distributions over m + 1 outcomes. It is at most the
    divergence over the whole vocabulary, because differences inside the tail do not count.
    """
    logits_BWKV = logits_BWKV.float()
    total_BWK = logits_BWKV.logsumexp(dim=-1)
    p = soft.logp_BWKM.exp()
    if soft.ids_BWKM is None:
        return (p * (soft.logp_BWKM - logits_BWKV)).sum(dim=-1) + p.sum(dim=-1) * total_BWK
    logq = logits_BWKV.gather(-1, soft.ids_BWKM) - total_BWK[..., None]
    divergence = (p * (soft.logp_BWKM - logq)).sum(dim=-1)
    if soft.ids_BWKM.shape[-1] == logits_BWKV.shape[-1]:
        return divergence
    rest_BWK = logits_BWKV.scatter(-1, soft.ids_BWKM, -torch.inf).logsumexp(dim=-1)
    tail_p, tail_logq = soft.tail_BWK, rest_BWK - total_BWK
    return divergence + torch.special.xlogy(tail_p, tail_p) - tail_p * tail_logq


@torch.no_grad()
def block_sums(loss: Tensor, windows: int, right_RK: Tensor, nll_RK: Tensor) -> LossSums:
    """The sums over `windows` windows. Match and NLL were measured on some of them, and are scaled up to all."""
    right, nll = right_RK.flatten(0, -2).float(), nll_RK.flatten(0, -2)
    share = windows / len(right)
    block = right.prod(-1).sum() * share
    return LossSums(loss, nll.sum(0) * (windows / len(nll)), right.sum(0) * share, block, windows)


def hard_target_loss(head: nn.Module, states_BWKD: Tensor, targets_BWK: Tensor, chunk: int = CHUNK) -> LossSums:
    """−log p_j(target_j) in float32, summed over batch, windows and offsets (K-Forcing's training loss).

    Args:
        head: maps states to logits.
        states_BWKD: the states from which each token is read.
        targets_BWK: int64.
        chunk: number of tokens whose logits exist at a time.
    """
    states_RD, targets_R = states_BWKD.flatten(0, 2), targets_BWK.flatten()

    def part(rows: slice, states_RD: Tensor) -> tuple[Tensor, ...]:
        logits, targets = head(states_RD), targets_R[rows]
        nll = target_nll(logits, targets)
        return nll, nll.detach(), logits.detach().argmax(dim=-1) == targets

    loss, *measured = loss_in_chunks(part, [states_RD], head, chunk)
    nll, right = (x.view(targets_BWK.shape) for x in measured)
    return block_sums(loss, nll[..., 0].numel(), right, nll)


def next_token_loss(backbone: PreTrainedModel, context_BN: Tensor, chunk: int = CHUNK) -> LossSums:
    """The AR model's next-token loss on packed blocks (its training loss as the pipeline's first stage)."""
    states = backbone.base_model(input_ids=context_BN, use_cache=False).last_hidden_state
    return hard_target_loss(head(backbone), states[:, :-1, None], context_BN[:, 1:, None], chunk)
