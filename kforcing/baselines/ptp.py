"""Parallel token prediction with verification (Draxler et al., arXiv 2512.21323): draft and verification use the same noise.

    draft     the noise-inversion student makes k tokens of z_1 … z_k in one pass
    verify    the AR model reads them in one pass and makes its own tokens of the same noise; a token is kept when all
              drafts before it were right

The text is the AR model's, token for token. Two passes give 1 to k + 1 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.attention.windows import Windows
from kforcing.backbone import lm_head
from kforcing.baselines.base import Decoded, Readers, RowReader, Rows, decode_rows, verify, with_row_kernel
from kforcing.coupling import inverse_cdf
from kforcing.modeling import PushForwardLM


class PTPDecoder:
    """Decodes with drafts of a noise-inversion student that the AR model verifies."""

    def __init__(self, student: PushForwardLM, teacher: PreTrainedModel):
        self.student, self.teacher = with_row_kernel(student.eval()), with_row_kernel(teacher.eval())
        self.drafters, self.checkers = Readers(self.student.backbone), Readers(self.teacher)

    @torch.inference_mode()
    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts; see `kforcing.baselines.base.Decoder`.

        Raises ValueError for prompts of fewer than k + 1 tokens, which each step reads again.
        """
        N = prompts_RN.shape[1]
        k = self.student.k
        again = k + 1  # a step adds up to k + 1 tokens, and the student must read all of them before the next draft
        if again > N:
            raise ValueError(
                f"prompts of {N} tokens: a draft of k={k} reads the last {again}; give prompts of at least {again} tokens"
            )
        rows = Rows(prompts_RN, seeds, new_tokens, spare=again)
        drafter, checker = self.drafters(rows), self.checkers(rows)
        drafter.tokens(prompts_RN)
        checker.tokens(prompts_RN[:, :-1])

        def step() -> None:
            z_RL = rows.noise(rows.length_R, k + 1)
            drafts = self._draft(rows, drafter, z_RL[:, :k], again)
            last = rows.length_R - 1
            states = checker.at(last).tokens(torch.cat([rows.tokens(last, 1), drafts], dim=1))
            sure = inverse_cdf(lm_head(self.teacher, states).float(), z_RL, 1.0)
            rows.append(sure, verify(drafts, sure))

        return decode_rows(rows, new_tokens, step, passes_a_step=2)

    def _draft(self, rows: Rows, reader: RowReader, z_RK: Tensor, again: int) -> Tensor:
        """(R, k) tokens of the student, after it has read the last tokens of every row."""
        start_R = rows.length_R - again
        windows = Windows(
            context_BN=rows.tokens_RC,
            anchors_BW=rows.length_R[:, None] - 1,
            noise_BWK=z_RK[:, None],
            temperature_B=torch.ones(len(z_RK), device=z_RK.device),
            prefix_BWP=rows.tokens(start_R, again)[:, None],
        )

        def pick(logits_BWV: Tensor, offset: int) -> Tensor:
            return self.student.readout.pick(logits_BWV, z_RK[:, offset, None], 1.0)

        backbone: Any = self.student.backbone
        turns = self.student.readout.turns(backbone, windows, reader.at(start_R), None, pick)
        return torch.cat([token for _, token in turns], dim=1)
