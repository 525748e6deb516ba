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

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kforcing.attention.windows import Windows, read_context
from kforcing.backbone import check_head_rows, lm_head
from kforcing.chunking import CHUNK, loss_in_chunks
from kforcing.distillation.losses import LossSums
from kforcing.modeling import PushForwardLM
from kforcing.noise import race_words

TEXT_LOSSES = ("kl", "tv", "blend", "length")
LIKELIEST = 32
"""Of a position's tokens, how many are among those that matter when the loss is computed on some of them."""
MATCH_STRIDE = 32
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
    def windows(self) -> Windows:
        """The windows, at temperature 1."""
        temperature_B = torch.ones(len(self.tokens_BN), device=self.tokens_BN.device)
        return Windows(self.tokens_BN, self.anchors_BW, self.noise_BWK, temperature_B)

    @property
    def places_BWK(self) -> Tensor:
        """int64, the position before each token of the blocks, which holds its label."""
        return self.anchors_BW[..., None] + torch.arange(self.k, device=self.anchors_BW.device)

    @property
    def blocks_BWK(self) -> Tensor:
        """int64, the tokens of the blocks."""
        return self.tokens_BN.gather(1, (self.places_BWK + 1).flatten(1)).view(self.noise_BWK.shape)

    @property
    def target_tokens(self) -> int:
        """Number of tokens of the blocks; the loss of the first of each is 0."""
        return self.noise_BWK.numel()


class TextStep(nn.Module):
    """The loss of a sequential student on windows whose blocks are the text.

    Args:
        model: a sequential student with a frozen trunk.
        loss: `kl`, the divergence of the student from the AR model; `tv`, 0.9 times their total variation plus 0.1
            times the divergence (acceptance under a coupling is a function of the total variation); `blend`, the
            divergence where they are far apart and the total variation where they are near (LK losses, arXiv 2602.23881);
            `length`, 0.9 times the share of drafts that a maximal coupling rejects, where a draft counts only if those
            before it are accepted, plus 0.1 times the divergence.
        sampled: how many tokens of the vocabulary, drawn at random for each chunk, stand for all that the AR model finds
            unlikely; 0 for the whole vocabulary. The LM head of the student is most of the arithmetic of a step.
        chunk: number of tokens whose logits exist at the same time.
    Raises:
        ValueError: for an unknown loss, a student that does not contain its AR model, or a sample of an LM head whose rows
            alone do not give logits.
    """

    def __init__(self, model: PushForwardLM, loss: str = "kl", sampled: int = 0, chunk: int = CHUNK):
        super().__init__()
        if loss not in TEXT_LOSSES:
            raise ValueError(f"loss={loss}: choose one of {', '.join(TEXT_LOSSES)}")
        if not model.design.exact_trunk or model.k < 2:
            raise ValueError(
                f"training on text takes its labels from the AR model inside the student and trains tokens 2 to k; this "
                f"student has readout={model.design.readout}, k={model.k}. Use a sequential one with a frozen trunk and k ≥ 2"
            )
        if sampled:
            check_head_rows(model.backbone, f"train.sampled_tokens={sampled}")
        self.model, self.loss, self.sampled, self.chunk = model, loss, sampled, chunk

    def forward(self, batch: TextBatch) -> LossSums:
        """Sums over the trained tokens.

        `nll_K` has the divergence from the AR model instead of a likelihood, 0 at token 1. `match_K` counts the blocks whose
        drafts up to each offset equal the AR model's draw under the same noise, which is the acceptance of exact mode.
        """
        backbone, K = self.model.backbone, batch.k
        with torch.no_grad():
            context = read_context(backbone, batch.tokens_BN)
        places_BWK, tokens_BWK = batch.places_BWK, batch.blocks_BWK
        scores = self.model.scores(batch.windows, tokens_BWK, context)
        B, N = batch.tokens_BN.shape
        rows_B11 = N * torch.arange(B, device=places_BWK.device)[:, None, None]
        part = _ChunkLoss(
            self,
            trunk_SD=context.states_BND.flatten(0, 1),
            places_RH=(places_BWK + rows_B11)[..., 1:].flatten(0, 1),
            tokens_RH=tokens_BWK[..., 1:].flatten(0, 1),
            noise_RH=batch.noise_BWK[..., 1:].flatten(0, 1),
        )
        states_RHD = scores.states_BWKD[:, :, 1:].flatten(0, 1)
        loss, kl_RH, agree_RH = loss_in_chunks(part, [states_RHD], scores.head, max(1, self.chunk // (K - 1)))
        windows_seen = len(states_RHD)
        match_H = agree_RH.long().cumprod(dim=-1).float().mean(dim=0) * windows_seen
        first = match_H.new_full((1,), windows_seen)
        nll_K = torch.cat([first * 0, kl_RH.sum(dim=0)])
        return LossSums(loss, nll_K, torch.cat([first, match_H]), match_H[-1].clone(), windows_seen)


class _ChunkLoss:
    """Loss, divergence and agreement of some windows, for `loss_in_chunks`.

    Args:
        step: whose loss it is.
        trunk_SD: the trunk's states at the S positions of all sequences.
        places_RH: int64, the position that holds the label of each trained token.
        tokens_RH: int64, the trained tokens of the text.
        noise_RH: noise under which drafts are compared.
    """

    def __init__(self, step: TextStep, trunk_SD: Tensor, places_RH: Tensor, tokens_RH: Tensor, noise_RH: Tensor):
        self.step, self.trunk_SD = step, trunk_SD
        self.places_RH, self.tokens_RH, self.noise_RH = places_RH, tokens_RH, noise_RH
        self.backbone, self.readout = step.model.backbone, step.model.readout

    def __call__(self, rows: slice, student_RHD: Tensor) -> tuple[Tensor, ...]:
        """(r,) loss with gradient, (r, H) divergence, (s, H) whether draws agree, of the s windows that are measured."""
        with torch.no_grad():
            # Windows share positions: each of the P positions of the chunk goes through the LM head once.
            places_P, index_RH = self.places_RH[rows].unique(return_inverse=True)
            logp_PV = lm_head(self.backbone, self.trunk_SD[places_P]).float().log_softmax(dim=-1)
        likely_V = self._likely(rows, logp_PV) if self.step.sampled else None
        if likely_V is not None and self.step.sampled < (~likely_V).sum():
            logq, logp = self._on_some_tokens(rows, student_RHD, logp_PV, index_RH, likely_V)
        else:
            logq, logp = lm_head(self.backbone, student_RHD).float().log_softmax(dim=-1), logp_PV[index_RH]
        loss_RH, kl_RH = self._loss(logq, logp)
        return loss_RH.sum(dim=-1), kl_RH, self._agreement(rows, student_RHD.detach(), logp_PV, index_RH)

    @torch.no_grad()
    def _likely(self, rows: slice, logp_PV: Tensor) -> Tensor:
        """(V,) bool: the likeliest tokens of the AR model at each position of a chunk, and the text's own."""
        likely_V = torch.zeros(logp_PV.shape[-1], dtype=torch.bool, device=logp_PV.device)
        likely_V[logp_PV.topk(min(LIKELIEST, len(likely_V)), dim=-1).indices.flatten()] = True
        likely_V[self.tokens_RH[rows].flatten()] = True
        return likely_V

    def _on_some_tokens(
        self, rows: slice, student_RHD: Tensor, logp_PV: Tensor, index_RH: Tensor, likely_V: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (r, H, M + 1) of student and AR model of the M likely tokens, and of all others together.

        The student's probability of the others is estimated from a sample that the noise of the chunk determines, so a step
        that is repeated has the same loss.
        """
        likely_M, others = likely_V.nonzero().squeeze(-1), (~likely_V).nonzero().squeeze(-1)
        draws = torch.arange(self.step.sampled, device=others.device)
        sample = others[race_words(self.noise_RH[rows][0, 0], draws).long() % len(others)]
        weight_MD = self.backbone.get_output_embeddings().weight[torch.cat([likely_M, sample])]
        # As one product: torch multiplies three dimensions window by window, which takes 16 times as long.
        logits = (student_RHD.flatten(0, 1) @ weight_MD.T).unflatten(0, student_RHD.shape[:2])
        kept, drawn = logits.float().split([len(likely_M), len(sample)], dim=-1)
        rest = drawn.logsumexp(dim=-1, keepdim=True) + math.log(len(others) / len(sample))
        with torch.no_grad():
            some_RHM = logp_PV[:, likely_M][index_RH]
            tail_RH1 = (1 - some_RHM.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-6).log()
        return torch.cat([kept, rest], dim=-1).log_softmax(dim=-1), torch.cat([some_RHM, tail_RH1], dim=-1)

    def _loss(self, logq: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and, without gradient, the divergence: (r, H) each, of (r, H, M) log-probabilities."""
        p = logp.exp()
        kl = (p * (logp - logq)).sum(dim=-1)
        if self.step.loss == "kl":
            return kl, kl.detach()
        tv = (logq.exp() - p).abs().sum(dim=-1) / 2
        if self.step.loss == "tv":
            return 0.9 * tv + 0.1 * kl, kl.detach()
        if self.step.loss == "length":
            return 0.9 * (1 - (1 - tv).cumprod(dim=-1)) + 0.1 * kl, kl.detach()
        weight = torch.exp(-3 * (1 - tv.detach()))
        return weight * kl + (1 - weight) * tv, kl.detach()

    @torch.no_grad()
    def _agreement(self, rows: slice, student_RHD: Tensor, logp_PV: Tensor, index_RH: Tensor) -> Tensor:
        seen = slice(-rows.start % MATCH_STRIDE, None, MATCH_STRIDE)
        noise, logits = self.noise_RH[rows][seen], lm_head(self.backbone, student_RHD[seen]).float()
        return self.readout.pick(logits, noise, 1.0) == self.readout.pick(logp_PV[index_RH[seen]], noise, 1.0)
