"""Masked diffusion (MDLM, Sahoo et al. 2024, arXiv 2406.07524): each pass unmasks tokens at several random positions.

Training masks each token of a block with probability t, where t is uniform, and predicts the masked tokens from all others.
Weights 1/t make the loss a bound on the NLL. The backbone reads in both directions (its attention mask is all ones) and
starts from the AR model's weights; as in the AR model, a token is predicted from the state before it. Decoding starts with
all new tokens masked. Each pass draws `k` random positions from their marginals.

Unmasking more than one position a pass cannot be lossless (Theorem 1 of K-Forcing). Positions that are unmasked together
are drawn independently given the rest, but their joint distribution is not the product of its marginals when they depend on
each other. `unmasking_law` computes the distribution of such a sampler exactly, when it is small enough to write down.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.backbone import embeddings, lm_head
from kforcing.baselines.base import Decoded, Rows, TextWindows, with_row_kernel
from kforcing.distillation.losses import LossSums


class MaskedLM(nn.Module):
    """A backbone that reads in both directions, with an embedding for masked tokens."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone = backbone
        self.mask = nn.Parameter(embeddings(backbone).weight.detach().mean(0))

    def forward(self, tokens_BN: Tensor, masked_BN: Tensor, at_BK: Tensor) -> Tensor:
        """Logits of tokens at some positions.

        Args:
            tokens_BN: int64.
            masked_BN: bool, True at masked tokens.
            at_BK: int64 positions from 1 on.
        Returns:
            (B, K, V) logits.
        """
        B, N = tokens_BN.shape
        x = torch.where(masked_BN[..., None], self.mask, embeddings(self.backbone)(tokens_BN))
        sees = torch.ones(1, 1, N, N, dtype=torch.bool, device=x.device).expand(B, -1, -1, -1)
        trunk: Any = self.backbone.base_model
        states = trunk(inputs_embeds=x, attention_mask=sees, use_cache=False).last_hidden_state
        before = (at_BK - 1)[..., None].expand(-1, -1, states.shape[-1])
        return lm_head(self.backbone, states.gather(1, before))


class MaskedStep(nn.Module):
    """The NELBO of masked diffusion on real text."""

    def __init__(self, model: MaskedLM):
        super().__init__()
        self.model = model

    def forward(self, batch: TextWindows) -> LossSums:
        """Σ over masked positions of −log p(token) / t. The rates t are spread evenly over the batch, for lower variance."""
        tokens_BN = batch.tokens_BN
        B, N = tokens_BN.shape
        u = batch.noise_BWK.flatten(1)  # (B, at least N) uniforms
        rate_B = ((torch.arange(B, device=u.device) + u[0, 0]) / B).clamp(min=1e-2)
        masked_BN = u[:, -N:] < rate_B[:, None]
        masked_BN[:, 0] = False
        logits = self.model(tokens_BN, masked_BN, torch.arange(1, N, device=u.device).expand(B, -1))
        targets = tokens_BN[:, 1:]
        nll = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        weight = masked_BN[:, 1:] / rate_B[:, None]
        loss = (nll.view_as(targets) * weight).sum()
        right = ((logits.argmax(-1) == targets) * weight).sum().detach().float()
        return LossSums(loss.float(), loss.detach().float()[None], right[None], right, targets.numel())


class MaskedDecoder:
    """Each pass unmasks `k` random positions of the continuation."""

    def __init__(self, model: MaskedLM, k: int):
        self.model, self.k = with_row_kernel(model.eval()), k

    @torch.inference_mode()
    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts; see `kforcing.baselines.base.Decoder`. The seeds also give the order of the positions."""
        N = prompts_RN.shape[1]
        rows = Rows(prompts_RN, seeds, new_tokens)
        order = Rows(prompts_RN, [seed + 2**32 for seed in seeds], new_tokens).noise_RC[:, N:].argsort(1) + N
        tokens, masked = rows.tokens_RC, torch.zeros_like(rows.tokens_RC, dtype=torch.bool)
        masked[:, N:] = True
        for chosen_RK in order.split(self.k, dim=1):
            p = self.model(tokens, masked, chosen_RK).double().softmax(-1).cumsum(-1)
            z = rows.noise_RC.gather(1, chosen_RK)[..., None] * p[..., -1:]
            tokens.scatter_(1, chosen_RK, torch.searchsorted(p, z)[..., 0].clamp(max=p.shape[-1] - 1))
            masked.scatter_(1, chosen_RK, False)
        return Decoded(tokens[:, N:], -(-new_tokens // self.k) / new_tokens)


def unmasking_law(joint: Tensor, k: int) -> Tensor:
    """The exact distribution of a sampler that knows every conditional marginal and unmasks k random positions a pass.

    Args:
        joint: (V, V, …) probabilities of n tokens, one dimension each.
        k: positions of a pass; the last pass takes those that are left.
    Returns:
        Probabilities of the same shape. Equal to `joint` for k = 1; for larger k only where positions that are unmasked
        together are independent given the others.
    """
    n = joint.ndim
    laws: dict[frozenset[int], Tensor] = {frozenset(range(n)): torch.ones_like(joint)}

    def given(known: frozenset[int]) -> Tensor:
        """The distribution of all positions, given the values of the known ones."""
        if known not in laws:
            masked = [i for i in range(n) if i not in known]
            subsets = list(itertools.combinations(masked, min(k, len(masked))))
            laws[known] = sum(
                (_product(joint, known, together) * given(known | set(together)) for together in subsets),
                torch.zeros_like(joint),
            ) / len(subsets)
        return laws[known]

    return given(frozenset())


def _product(joint: Tensor, known: frozenset[int], together: tuple[int, ...]) -> Tensor:
    """∏ p(x_i | known) over the positions that are unmasked together."""
    product = torch.ones_like(joint)
    base = _marginal(joint, known)
    for i in together:
        product = product * torch.nan_to_num(_marginal(joint, known | {i}) / base)
    return product


def _marginal(joint: Tensor, keep: frozenset[int]) -> Tensor:
    """Sum over all positions but `keep`; summed dimensions have size 1."""
    out = [i for i in range(joint.ndim) if i not in keep]
    return joint.sum(out, keepdim=True) if out else joint
