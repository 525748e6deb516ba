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
    """Scalar with gradient: Σ −log p(target)."""
    nll_K: Tensor
    """(K,) Σ over windows of −log p_j(target_j), no gradient."""
    match_K: Tensor
    """(K,) number of windows whose argmax at offset j is the target."""
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


def hard_target_loss(logits_BWKV: Tensor, targets_BWK: Tensor) -> LossSums:
    """−log p_j(target_j) in float32, summed over batch, windows and offsets (K-Forcing's training loss)."""
    K = targets_BWK.shape[-1]
    nll = cross_entropy(logits_BWKV.float().flatten(0, -2), targets_BWK.flatten(), reduction="none").view(-1, K)
    with torch.no_grad():
        right = (logits_BWKV.argmax(dim=-1) == targets_BWK).view(-1, K)
    return LossSums(nll.sum(), nll.detach().sum(0), right.float().sum(0), right.all(-1).float().sum(), len(nll))


def next_token_loss(backbone: PreTrainedModel, context_BN: Tensor) -> LossSums:
    """The AR model's next-token loss on packed blocks (its training loss as the pipeline's first stage)."""
    states = backbone.base_model(input_ids=context_BN, use_cache=False).last_hidden_state
    logits = lm_head(backbone, states[:, :-1])
    return hard_target_loss(logits[:, :, None], context_BN[:, 1:, None])
