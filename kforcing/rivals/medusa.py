"""Medusa: heads on the AR model's last state guess the tokens after the next, and the next pass verifies the guesses.

    pass      reads [ last token | guesses 2 … k ]    the AR model's own tokens after each, under the rows' noise
              keeps them as long as the guesses before were right, and at least one

Heads as in Cai et al. (2024, arXiv 2401.10774): a residual SiLU layer each, here with the LM head shared and the trunk frozen
(Medusa-1), a chain of guesses and no tree. Verification compares the guess with what the AR model makes of the same noise, so
the text is the AR model's, token for token: lossless, and simpler to prove than rejection sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.coupling import Coupling
from kforcing.losses import LossSums, hard_target_loss
from kforcing.rivals.inversion import silent_heads
from kforcing.rivals.rows import Decoded, RowReader, Rows, TextWindows, packed, run, verify
from kforcing.staircase import embeddings, head, lm_head


class MedusaHeads(nn.Module):
    """k − 1 heads: head j looks j tokens beyond the next one."""

    def __init__(self, backbone: PreTrainedModel, k: int):
        super().__init__()
        width = embeddings(backbone).weight.shape[1]
        self.heads = silent_heads(width, k - 1)

    def forward(self, state: Tensor) -> Tensor:
        """(..., D) → (..., k − 1, D) states to give to the LM head."""
        return torch.stack([state + nn.functional.silu(part(state)) for part in self.heads], dim=-2)


class MedusaStep(nn.Module):
    """The heads' loss on real text, above a frozen AR model."""

    def __init__(self, backbone: PreTrainedModel, k: int):
        super().__init__()
        self.heads = MedusaHeads(backbone, k)
        self._backbone = (backbone.requires_grad_(False),)  # in a tuple: it is not trained here

    def forward(self, batch: TextWindows) -> LossSums:
        """−log p_j(real token) of the tokens after the next, summed over windows."""
        backbone = self._backbone[0]
        with torch.no_grad():
            states_BND = backbone.base_model(input_ids=batch.tokens_BN, use_cache=False).last_hidden_state
        at = batch.anchors_BW[..., None].expand(-1, -1, states_BND.shape[-1])
        return hard_target_loss(head(backbone), self.heads(states_BND.gather(1, at)), batch.following_BWK[..., 1:])


class MedusaDecoder:
    """See the module's text."""

    def __init__(self, backbone: PreTrainedModel, heads: MedusaHeads, coupling: Coupling):
        self.backbone: Any = packed(backbone)
        self.heads, self.coupling = heads.eval(), coupling

    @torch.inference_mode()
    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """See `Decoder`. Raises ValueError for prompts of one token."""
        R, N = prompts_RN.shape
        if N < 2:
            raise ValueError(f"prompts of {N} token: the heads need a state before the last one; give at least 2")
        k = len(self.heads.heads) + 1
        columns = N + new_tokens * k + k
        rows, reader = Rows(prompts_RN, seeds, columns), RowReader(self.backbone, R, columns)
        state_RD = reader.tokens(prompts_RN[:, :-1])[:, -1]

        def step() -> None:
            nonlocal state_RD
            z_RK = rows.noise(rows.length_R, k)
            guesses = self.coupling(lm_head(self.backbone, self.heads(state_RD)).float(), z_RK[:, :-1], 1.0)
            last = rows.length_R - 1
            states_RKD = reader.at(last).tokens(torch.cat([rows.tokens(last, 1), guesses], dim=1))
            sure = self.coupling(lm_head(self.backbone, states_RKD).float(), z_RK, 1.0)
            keep_R = verify(guesses, sure)
            rows.append(sure, keep_R)
            state_RD = states_RKD[torch.arange(R, device=keep_R.device), keep_R - 1]

        return run(rows, N, new_tokens, step, passes_a_step=1)
