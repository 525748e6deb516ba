"""Teacher rollouts: what k coupled tokens does the frozen teacher make of each window's noise?

Two teachers with one method each. `ARTeacher` is the AR model's own unrolled coupling (exact, the ideal student).
`StudentTeacher` is a push-forward student that makes its k tokens, commits them and makes the next k: two passes of
PFLM(k) give the targets of PFLM(2k), the paper's self-forcing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import inverse_cdf
from kforcing.model import PushForwardLM, decode
from kforcing.staircase import ar_logits


class Teacher(Protocol):
    """Anything that turns windows and noise into tokens."""

    def rollout(self, context_BN: Tensor, anchors_BW: Tensor, noise_BWK: Tensor, temperature_B: Tensor) -> Tensor:
        """(B, W, K) int64 tokens of the windows, coupled to the noise."""
        ...


class ARTeacher:
    """K coupled steps of an AR model: token j is F⁻¹(z_j | context, tokens before j)."""

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone.eval()

    @torch.inference_mode()
    def rollout(self, context_BN: Tensor, anchors_BW: Tensor, noise_BWK: Tensor, temperature_B: Tensor) -> Tensor:
        """See `Teacher.rollout`."""
        tokens_BWP = anchors_BW.new_empty(*anchors_BW.shape, 0)
        for j in range(noise_BWK.shape[2]):
            logits_BWV = ar_logits(self.backbone, context_BN, anchors_BW, tokens_BWP)
            token_BW = inverse_cdf(logits_BWV, noise_BWK[..., j], temperature_B[:, None])
            tokens_BWP = torch.cat([tokens_BWP, token_BW[..., None]], dim=2)
        return tokens_BWP

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Tensor,
        *,
        max_new_tokens: int,
        seed: int = 0,
        eos_token_id: int | None = None,
        temperature: float = 1.0,
    ) -> list[list[int]]:
        """Plain AR decoding by inverse CDF under the same noise as `PushForwardLM.generate`."""

        def step(ids: Tensor, noise: Tensor) -> Tensor:
            logits = self.backbone(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            return inverse_cdf(logits, noise[:, 0], temperature)[:, None]

        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        return decode(step, prompt_ids, 1, max_new_tokens, seed, eos_token_id, limit)


class StudentTeacher:
    """Passes of a push-forward student, each conditioned on the tokens of the passes before it."""

    def __init__(self, student: PushForwardLM, k: int | None = None):
        self.student = student.eval()
        self.k = k or student.k

    @torch.inference_mode()
    def rollout(self, context_BN: Tensor, anchors_BW: Tensor, noise_BWK: Tensor, temperature_B: Tensor) -> Tensor:
        """See `Teacher.rollout`."""
        tokens_BWP = anchors_BW.new_empty(*anchors_BW.shape, 0)
        for start in range(0, noise_BWK.shape[2], self.k):
            noise = noise_BWK[..., start : start + self.k]
            logits = self.student.window_logits(context_BN, anchors_BW, noise, tokens_BWP, temperature_B)
            tokens_BWP = torch.cat([tokens_BWP, logits.argmax(dim=-1)], dim=2)
        return tokens_BWP
