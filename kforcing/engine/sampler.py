"""Tokens from the logits of all slots at once, each slot by the options of its request.

Shapes: S slots, R the slots of a step, P tokens that a step verifies, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kforcing.coupling import first_largest
from kforcing.engine.request import SamplingParams


def log_probabilities(logits: Tensor, tokens: Tensor, n: int) -> Tensor:
    """(..., V) logits and (...) tokens → (..., 1 + 2n) float64: ln p of the token and of the n likeliest, then their ids."""
    logits = logits.float()
    best, ids = logits.topk(min(n, logits.shape[-1]), dim=-1)
    own = logits.gather(-1, tokens[..., None])
    logprobs = torch.cat([own, best], dim=-1) - logits.logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs.double(), ids.double()], dim=-1)


class Sampler:
    """The options of each slot as tensors, and how often each token occurs in the slot's final tokens.

    Args:
        readout: its `pick` makes tokens; where requests may have filters it has a coupling too.
    """

    def __init__(self, slots: int, vocabulary: int, readout: Any, device: torch.device):
        self.readout, self.draw = readout, readout.pick
        self.temperature_S = torch.ones(slots, dtype=torch.float64, device=device)
        self.greedy_S = torch.zeros(slots, dtype=torch.bool, device=device)
        self.top_k_S = torch.full((slots,), vocabulary, device=device)
        self.top_p_S = torch.ones(slots, dtype=torch.float64, device=device)
        self.frequency_S = torch.zeros(slots, device=device)
        self.presence_S = torch.zeros(slots, device=device)
        self.repetition_S = torch.ones(slots, device=device)
        self.min_p_S = torch.zeros(slots, dtype=torch.float64, device=device)
        self.min_tokens_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.stops_SV = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self.prompt_SV = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self.bias_SV = torch.zeros(slots, vocabulary, device=device)
        self.counts_SV = torch.zeros(slots, vocabulary, device=device)
        self.vocabulary = vocabulary
        self.options = [SamplingParams()] * slots
        self.one_by_one = device.type == "cpu"
        """Each row takes only the way that its options need. On a GPU all rows go one way, which a graph can capture. The
        tokens are the same."""

    def join(
        self, slot: int, sampling: SamplingParams, prompt: Tensor | None = None, stop_ids: Iterable[int] = ()
    ) -> None:
        """Take over the options of a request that begins in a slot, with the ids of its prompt and those that may end it."""
        self.options[slot] = sampling
        self.temperature_S[slot] = sampling.temperature or 1e-3  # drafts of a greedy request are as good as greedy
        self.greedy_S[slot] = sampling.temperature == 0
        self.top_k_S[slot] = min(sampling.top_k or self.vocabulary, self.vocabulary)
        self.top_p_S[slot] = sampling.top_p
        self.frequency_S[slot] = sampling.frequency_penalty
        self.presence_S[slot] = sampling.presence_penalty
        self.repetition_S[slot] = sampling.repetition_penalty
        self.min_p_S[slot] = sampling.min_p
        self.min_tokens_S[slot] = sampling.min_tokens
        for state_SV in (self.counts_SV, self.stops_SV, self.prompt_SV, self.bias_SV):
            state_SV[slot] = 0
        self.stops_SV[slot, [id for id in stop_ids if 0 <= id < self.vocabulary]] = True
        self.bias_SV[slot, list(sampling.logit_bias)] = torch.tensor(
            list(sampling.logit_bias.values()), dtype=torch.float32, device=self.bias_SV.device
        )
        if prompt is not None:
            self.prompt_SV[slot, prompt] = True

    def move(self, source: int, target: int) -> None:
        """Copy the state of a slot to another slot."""
        self.options[target] = self.options[source]
        for state in vars(self).values():
            if isinstance(state, Tensor):
                state[target] = state[source]

    def __call__(
        self, logits_RV: Tensor, z_R: Tensor, counts_RV: Tensor | None, allowed_RV: Tensor | None = None
    ) -> Tensor:
        """(R,) tokens of the first R slots.

        Args:
            counts_RV: how often each token occurred before, for penalties. None says that no slot has options beyond a
                temperature; the tokens are the same as with counts, and come faster.
            allowed_RV: bool, the tokens that grammars allow; needs counts.
        """
        R = len(logits_RV)
        temperature_R = self.temperature_S[:R]
        if counts_RV is None:
            return self.draw(logits_RV, z_R, temperature_R)
        if self.one_by_one:
            return self._each(logits_RV, z_R, counts_RV, allowed_RV)
        logits_RV = _only(self._changed(slice(0, R), logits_RV, counts_RV), allowed_RV)
        drawn_R = self.draw(self._filtered(logits_RV, temperature_R), z_R, temperature_R)
        return torch.where(self.greedy_S[:R], logits_RV.argmax(dim=-1), drawn_R)

    def along_drafts(
        self,
        logits_RPV: Tensor,
        z_RP: Tensor,
        tokens_RP: Tensor,
        drafted_RP: Tensor,
        allowed: Callable[[int], Tensor | None] | None,
    ) -> Tensor:
        """(R, P) the AR model's own tokens behind each of P tokens, of which some are drafts.

        Args:
            logits_RPV: the AR model's logits behind each token.
            tokens_RP: the tokens; drafts count for penalties at the positions behind them.
            drafted_RP: bool, which of them are drafts; the others are counted already.
            allowed: the tokens (R, V) that grammars allow behind token i. None says that no slot has options beyond a
                temperature.
        """
        R, P = tokens_RP.shape
        if allowed is None:
            return self.draw(logits_RPV, z_RP, self.temperature_S[:R, None])
        counts_RV = self.counts_SV[:R].clone()
        drawn = []
        for i in range(P):
            counts_RV.scatter_add_(1, tokens_RP[:, i : i + 1], drafted_RP[:, i : i + 1].float())
            drawn.append(self(logits_RPV[:, i], z_RP[:, i], counts_RV, allowed(i)))
        return torch.stack(drawn, dim=1)

    def count(self, tokens_RL: Tensor, final_RL: Tensor) -> None:
        """Count those of (R, L) tokens that `final_RL` (bool) marks."""
        self.counts_SV[: len(tokens_RL)].scatter_add_(1, tokens_RL, final_RL.float())

    def _changed(self, slots: slice, logits_RV: Tensor, counts_RV: Tensor) -> Tensor:
        """The float32 logits of some slots with bias and penalties, and without stop ids where it is too early for them."""
        logits_RV = logits_RV.float() + self.bias_SV[slots]
        early_R1 = counts_RV.sum(dim=-1, keepdim=True) < self.min_tokens_S[slots, None]
        logits_RV = logits_RV.masked_fill(self.stops_SV[slots] & early_R1, -torch.inf)
        made_RV, repetition_R1 = counts_RV > 0, self.repetition_S[slots, None]
        repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
        logits_RV = torch.where(made_RV | self.prompt_SV[slots], repeated_RV, logits_RV)
        return logits_RV - (self.frequency_S[slots, None] * counts_RV + self.presence_S[slots, None] * made_RV)

    def _filtered(self, logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
        """The logits, with −inf for tokens beyond top-k, top-p and min-p."""
        order = logits_RV.argsort(dim=-1, descending=True, stable=True)
        p = _probabilities(logits_RV, temperature_R[:, None]).gather(-1, order).double()
        before = p.cumsum(dim=-1) - p
        top_p, top_k, min_p = (option_S[: len(p), None] for option_S in (self.top_p_S, self.top_k_S, self.min_p_S))
        keep = ((before < top_p) | (top_p >= 1)) & (torch.arange(p.shape[-1], device=p.device) < top_k)
        keep &= p >= min_p * p[:, :1]
        return logits_RV.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)

    def _each(self, logits_RV: Tensor, z_R: Tensor, counts_RV: Tensor, allowed_RV: Tensor | None) -> Tensor:
        """(R,) tokens, each row by its own options."""
        token_R = torch.empty(len(z_R), dtype=torch.int64)
        drawn, rows = [], []
        for i, options in enumerate(self.options[: len(z_R)]):
            logits_V, own = logits_RV[i].float(), slice(i, i + 1)
            if options.changes_logits:
                logits_V = self._changed(own, logits_RV[own], counts_RV[own])[0]
            if allowed_RV is not None:
                logits_V = _only(logits_V, allowed_RV[i])
            if options.temperature == 0:
                token_R[i] = first_largest(logits_V)
            elif options.filters:
                ids = _kept(logits_V, self.temperature_S[i], options)
                token_R[i] = self.readout.coupling(logits_V[ids], z_R[i], self.temperature_S[i], ids)
            else:
                drawn.append(i)
                rows.append(logits_V)
        if drawn:
            token_R[drawn] = self.draw(torch.stack(rows), z_R[drawn], self.temperature_S[drawn])
        return token_R


def _only(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """(…, V) logits with −inf for tokens that are not allowed (V,); where that leaves none, all allowed ones are equal."""
    if allowed is None:
        return logits
    masked = logits.masked_fill(~allowed, -torch.inf)
    none = masked.isneginf().all(dim=-1, keepdim=True)
    return torch.where(none, torch.zeros_like(logits).masked_fill(~allowed, -torch.inf), masked)


def _probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    return (logits / temperature.float()).softmax(dim=-1)


def _kept(logits_V: Tensor, temperature: Tensor, options: SamplingParams) -> Tensor:
    """The tokens that `Sampler._filtered` keeps of a row, in ascending order.

    It sorts only those that are likely enough, and more of them where these are too few.
    """
    top_k, top_p, min_p = options.top_k or len(logits_V), options.top_p, options.min_p
    p_V = _probabilities(logits_V, temperature) if top_p < 1 or min_p > 0 else None
    largest, scale = logits_V.amax().item(), temperature.item()
    for least in (1e-3, 1e-4, 1e-5, 0.0):
        threshold = largest + scale * math.log(least) if least else -math.inf
        ids = (logits_V >= threshold).nonzero().squeeze(1)
        order = logits_V[ids].argsort(descending=True, stable=True)
        n, enough = min(top_k, len(ids)), len(ids) >= top_k
        if p_V is not None:
            p = p_V[ids[order]].double()
            total = p.cumsum(dim=-1)
            n = min(n, int((p >= min_p * p[0]).sum()))
            if top_p < 1:
                n = min(n, int((total - p < top_p).sum()))
            enough = enough or (total[-1].item() >= top_p and top_p < 1) or least < 0.9 * min_p
        if enough:
            break
    return ids[order[:n]].sort().values
