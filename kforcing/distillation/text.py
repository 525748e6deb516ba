"""Training on text that is its own label: every position of a sequence is a window, and its block is the text itself.

The trunk of a sequential student is the AR model. One pass of it over a sequence holds the teacher's distribution at every
position, so the tokens after any position are a block whose labels cost nothing: no rollouts, no labels that travel, and no
students of smaller k on the way.

    text            … x_t | x_t+1  x_t+2  x_t+3  x_t+4 …
    window t        context up to x_t, block x_t+1 … x_t+4
    labels          the trunk's states at t, t+1, t+2, t+3, times the LM head

Token 1 of a block is the trunk's own and is not trained.

Shapes: B batch, N tokens of a sequence, W windows, K tokens of a block, H = K − 1 trained tokens, R = B · W rows, D width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import lm_head
from kforcing.chunking import CHUNK, loss_in_chunks
from kforcing.distillation.losses import LossSums
from kforcing.modeling import PushForwardLM

TEXT_LOSSES = ("kl", "tv", "blend")
MATCH_STRIDE = 8
"""Acceptance is measured on one window out of so many: it draws from the whole vocabulary."""


@dataclass(frozen=True)
class TextBatch:
    """Sequences of tokens with some of their positions as windows."""

    tokens_BN: Tensor
    """int64 token ids."""
    anchors_BW: Tensor
    """int64, sorted in each row: the last context token of each window, at most N − 1 − K."""
    noise_BWK: Tensor
    """float64 in (0, 1): the noise under which drafts and the AR model's tokens are compared. The loss does not use it."""

    @property
    def k(self) -> int:
        """Tokens of a block."""
        return self.noise_BWK.shape[2]

    @property
    def target_tokens(self) -> int:
        """Number of tokens that the loss is summed over."""
        return self.anchors_BW.numel() * (self.k - 1)


class TextStep(nn.Module):
    """The loss of a sequential student on windows whose blocks are the text.

    Args:
        model: a sequential student with a frozen trunk.
        loss: `kl`, the divergence of the student from the AR model; `tv`, their total variation plus a tenth of the
            cross-entropy of the text (acceptance under a coupling is a function of the total variation); `blend`, the
            divergence where they are far apart and the total variation where they are near (LK losses, arXiv 2602.23881).
        chunk: number of tokens whose logits exist at the same time.
    Raises:
        ValueError: for an unknown loss, or a student that does not contain its AR model.
    """

    def __init__(self, model: PushForwardLM, loss: str = "kl", chunk: int = CHUNK):
        super().__init__()
        if loss not in TEXT_LOSSES:
            raise ValueError(f"loss={loss}: choose one of {', '.join(TEXT_LOSSES)}")
        if not model.design.exact_trunk or model.k < 2:
            raise ValueError(
                f"training on text takes its labels from the AR model inside the student and trains tokens 2 to k; this "
                f"student has readout={model.design.readout}, k={model.k}. Use a sequential one with a frozen trunk and k ≥ 2"
            )
        self.model, self.loss, self.chunk = model, loss, chunk

    def forward(self, batch: TextBatch) -> LossSums:
        """Sums over the trained tokens.

        `nll_K` has the divergence from the AR model instead of a likelihood, 0 at token 1. `match_K` counts the blocks whose
        drafts up to each offset equal the AR model's draw under the same noise, which is the acceptance of exact mode.
        """
        backbone, K = self.model.backbone, batch.k
        with torch.no_grad():
            context = read_context(backbone, batch.tokens_BN)
        places_BWK = batch.anchors_BW[..., None] + torch.arange(K, device=batch.anchors_BW.device)
        tokens_BWK = batch.tokens_BN.gather(1, (places_BWK + 1).flatten(1)).view(places_BWK.shape)
        teacher_BWHD = context.at(places_BWK[..., 1:].flatten(1)).unflatten(1, (-1, K - 1))
        temperature_B = torch.ones(len(batch.tokens_BN), device=batch.tokens_BN.device)
        windows = Windows(batch.tokens_BN, batch.anchors_BW, batch.noise_BWK, temperature_B)
        scores = self.model.scores(windows, tokens_BWK, context)
        noise_RH, next_RH = batch.noise_BWK[..., 1:].flatten(0, 1), tokens_BWK[..., 1:].flatten(0, 1)
        teacher_RHD = teacher_BWHD.flatten(0, 1)

        def part(rows: slice, student_RHD: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                teacher = lm_head(backbone, teacher_RHD[rows]).float()
            student = scores.head(student_RHD).float()
            loss_RH, kl_RH = self._token_loss(student, teacher, next_RH[rows])
            with torch.no_grad():
                seen = slice(-rows.start % MATCH_STRIDE, None, MATCH_STRIDE)
                noise = noise_RH[rows][seen]
                agree = self.model.readout.pick(student[seen], noise, 1.0) == self.model.readout.pick(
                    teacher[seen], noise, 1.0
                )
            return loss_RH.sum(dim=-1), kl_RH, agree

        states_RHD = scores.states_BWKD[:, :, 1:].flatten(0, 1)
        size = max(1, self.chunk // (K - 1))
        loss, kl_RH, agree_RH = loss_in_chunks(part, [states_RHD], scores.head, size)
        accepted_RH = agree_RH.long().cumprod(dim=-1).float()
        rows = len(states_RHD)
        match_H = accepted_RH.mean(dim=0) * rows
        first = match_H.new_full((1,), rows)
        return LossSums(
            loss, torch.cat([first * 0, kl_RH.sum(dim=0)]), torch.cat([first, match_H]), match_H[-1].clone(), rows
        )

    def _token_loss(self, student: Tensor, teacher: Tensor, next_RH: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and, without gradient, the divergence: (r, H) each, of (r, H, V) logits."""
        logq, logp = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
        p = logp.exp()
        kl = (p * (logp - logq)).sum(dim=-1)
        if self.loss == "kl":
            return kl, kl.detach()
        tv = (logq.exp() - p).abs().sum(dim=-1) / 2
        if self.loss == "tv":
            nll = -logq.gather(-1, next_RH[..., None]).squeeze(-1)
            return 0.9 * tv + 0.1 * nll, kl.detach()
        weight = torch.exp(-3 * (1 - tv.detach()))
        return weight * kl + (1 - weight) * tv, kl.detach()
