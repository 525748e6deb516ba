"""Tokens from the logits of all slots at once, each by its request's options.

Shapes: S slots, R the slots of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kforcing.engine.request import SamplingParams

Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(R, V) logits, (R,) noise and (R,) temperatures → (R,) tokens: `Readout.pick` of the model."""


class Sampler:
    """Options of each slot as tensors, and what its request has made so far."""

    def __init__(self, slots: int, vocabulary: int, draw: Draw, device: torch.device):
        self.draw = draw
        self.temperature_S = torch.ones(slots, dtype=torch.float64, device=device)
        self.greedy_S = torch.zeros(slots, dtype=torch.bool, device=device)
        self.top_k_S = torch.full((slots,), vocabulary, device=device)
        self.top_p_S = torch.ones(slots, dtype=torch.float64, device=device)
        self.frequency_S = torch.zeros(slots, device=device)
        self.presence_S = torch.zeros(slots, device=device)
        self.counts_SV = torch.zeros(slots, vocabulary, device=device)
        self.vocabulary = vocabulary

    def join(self, slot: int, sampling: SamplingParams) -> None:
        """A request takes a slot."""
        self.temperature_S[slot] = sampling.temperature or 1e-3  # drafts of a greedy request are as good as greedy
        self.greedy_S[slot] = sampling.temperature == 0
        self.top_k_S[slot] = min(sampling.top_k or self.vocabulary, self.vocabulary)
        self.top_p_S[slot] = sampling.top_p
        self.frequency_S[slot] = sampling.frequency_penalty
        self.presence_S[slot] = sampling.presence_penalty
        self.counts_SV[slot] = 0

    def move(self, source: int, target: int) -> None:
        """A request changes its slot."""
        for state in vars(self).values():
            if isinstance(state, Tensor):
                state[target] = state[source]

    def __call__(self, logits_RV: Tensor, z_R: Tensor, kept_R: Tensor | None, plain: bool) -> Tensor:
        """(R,) tokens of the first R slots.

        `plain` says that none of them has options beyond a temperature, and gives for such slots what the long way does.
        `kept_R` marks slots that will keep the token, whose counts it enters (k' < k leaves some out).
        """
        R = len(logits_RV)
        temperature_R = self.temperature_S[:R]
        if plain:
            return self.draw(logits_RV, z_R, temperature_R)
        counts_RV = self.counts_SV[:R]
        penalty_RV = self.frequency_S[:R, None] * counts_RV + self.presence_S[:R, None] * (counts_RV > 0)
        logits_RV = logits_RV.float() - penalty_RV
        filtered_RV = self._filtered(logits_RV, temperature_R)
        token_R = torch.where(self.greedy_S[:R], logits_RV.argmax(dim=-1), self.draw(filtered_RV, z_R, temperature_R))
        kept = torch.ones(R, device=token_R.device) if kept_R is None else kept_R.float()
        counts_RV.scatter_add_(1, token_R[:, None], kept[:, None])
        return token_R

    def _filtered(self, logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
        """−inf for tokens beyond top-k and top-p."""
        R = len(logits_RV)
        best, order = (logits_RV.double() / temperature_R[:, None]).sort(dim=-1, descending=True, stable=True)
        p = best.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p
        top_p = self.top_p_S[:R, None]
        rank = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
        keep = ((before < top_p) | (top_p >= 1)) & (rank < self.top_k_S[:R, None])
        return logits_RV.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)
