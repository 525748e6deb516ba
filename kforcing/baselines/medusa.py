"""Medusa: heads on the AR model's last state guess the tokens after the next one, and the next pass verifies the guesses.

    a pass   reads [ last token | k guesses ] and gives the AR model's own token after each, under the rows' noise;
             a token is kept when all guesses before it were right, so each pass keeps at least one

Each head is a residual SiLU layer as in Cai et al. (2024, arXiv 2401.10774). Here the heads share the LM head, the trunk is
frozen (Medusa-1), and guesses form a chain and not a tree. Verification compares a guess with the token that the AR model
makes of the same noise. Therefore the text is the AR model's, token for token. Rejection
sampling would be harder to prove.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.backbone import embeddings, head, lm_head
from kforcing.baselines.base import Decoded, Readers, Rows, TextWindows, decode_rows, verify, with_row_kernel
from kforcing.baselines.inversion import silent_heads
from kforcing.coupling import Coupling
from kforcing.distillation.losses import LossSums, hard_target_loss


class MedusaHeads(nn.Module):
    """k heads: head j guesses the token that is j places after the next one."""

    def __init__(self, backbone: PreTrainedModel, k: int):
        super().__init__()
        width = embeddings(backbone).weight.shape[1]
        self.heads = silent_heads(width, k)

    def forward(self, state: Tensor) -> Tensor:
        """(..., D) state → (..., k, D) inputs of the LM head."""
        return torch.stack([state + nn.functional.silu(part(state)) for part in self.heads], dim=-2)


class MedusaStep(nn.Module):
    """The loss of k heads on windows of k + 1 tokens of real text, above a frozen AR model."""

    def __init__(self, backbone: PreTrainedModel, heads: MedusaHeads):
        super().__init__()
        self.heads = heads
        self._backbone = (backbone.requires_grad_(False),)  # a tuple hides its parameters from the optimiser

    def forward(self, batch: TextWindows) -> LossSums:
        """−log p_j(real token) of the tokens after the next one, summed over windows."""
        backbone = self._backbone[0]
        with torch.no_grad():
            states_BND = backbone.base_model(input_ids=batch.tokens_BN, use_cache=False).last_hidden_state
        at = batch.anchors_BW[..., None].expand(-1, -1, states_BND.shape[-1])
        return hard_target_loss(head(backbone), self.heads(states_BND.gather(1, at)), batch.following_BWK[..., 1:])


class MedusaDecoder:
    """Decodes with guesses of the heads that the AR model verifies."""

    def __init__(self, backbone: PreTrainedModel, heads: MedusaHeads, coupling: Coupling):
        self.backbone: Any = with_row_kernel(backbone)
        self.heads, self.coupling, self.readers = heads.eval(), coupling, Readers(self.backbone)

    @torch.inference_mode()
    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts; see `kforcing.baselines.base.Decoder`. Raises ValueError for prompts of one token."""
        R, N = prompts_RN.shape
        if N < 2:
            raise ValueError(f"prompts of {N} token: the heads need a state before the last one; give at least 2")
        k = len(self.heads.heads)
        rows = Rows(prompts_RN, seeds, new_tokens, spare=k + 1)
        reader = self.readers(rows)
        state_RD = reader.tokens(prompts_RN[:, :-1])[:, -1]

        def step() -> None:
            nonlocal state_RD
            z_RL = rows.noise(rows.length_R, k + 1)
            guesses = self.coupling(lm_head(self.backbone, self.heads(state_RD)).float(), z_RL[:, :-1], 1.0)
            last = rows.length_R - 1
            states_RLD = reader.at(last).tokens(torch.cat([rows.tokens(last, 1), guesses], dim=1))
            sure = self.coupling(lm_head(self.backbone, states_RLD).float(), z_RL, 1.0)
            keep_R = verify(guesses, sure)
            rows.append(sure, keep_R)
            state_RD = states_RLD[torch.arange(R, device=keep_R.device), keep_R - 1]

        return decode_rows(rows, new_tokens, step, passes_a_step=1)
