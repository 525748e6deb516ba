"""The loss of one micro-batch: next tokens for an AR model, rolled-out windows for a student.

Shapes: B batch, N tokens of a sequence, W windows, K tokens of a block, R = B · W rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import ar_block_states
from kforcing.attention.windows import Context, Windows, read_context
from kforcing.backbone import lm_head
from kforcing.chunking import CHUNK, loss_in_chunks
from kforcing.distillation.losses import LossSums, SoftTargets, block_sums, next_token_loss, soft_target_kl, target_nll
from kforcing.modeling import PushForwardLM
from kforcing.readout.base import BlockScores

# Training measures match on one window out of this many, because each draw is a pass over the whole vocabulary.
MATCH_STRIDE = 4


@dataclass(frozen=True)
class TokenBatch:
    """Token blocks of a micro-batch, for AR training."""

    tokens_BN: Tensor
    """int64 token ids."""

    @property
    def target_tokens(self) -> int:
        """Number of tokens that the loss is summed over."""
        return self.tokens_BN.shape[0] * (self.tokens_BN.shape[1] - 1)


@dataclass(frozen=True)
class WindowBatch:
    """Rolled-out windows of a micro-batch, for student training."""

    windows: Windows
    targets_BWK: Tensor
    """int64 tokens that the teacher made."""
    soft: SoftTargets | None = None
    """The teacher's distributions at the targets; None when they do not come with the rollouts."""
    on_policy_B: Tensor | None = None
    """bool, the sequences whose windows the student rolls out again itself; None when there are no such sequences."""

    @property
    def target_tokens(self) -> int:
        """Number of tokens that the loss is summed over."""
        return self.targets_BWK.numel()


class StudentStep(nn.Module):
    """The loss of a student on a micro-batch of rolled-out windows.

    Args:
        model: the student.
        loss: `hard` for the negative log-likelihood of the targets, `soft` for the KL divergence from the teacher.
        chunk: number of tokens whose logits exist at the same time.
    """

    def __init__(self, model: PushForwardLM, loss: str = "hard", chunk: int = CHUNK):
        super().__init__()
        self.model, self.loss, self.chunk = model, loss, chunk

    def forward(self, batch: WindowBatch) -> LossSums:
        """Sums of the loss over the windows."""
        windows, targets = batch.windows, self._targets(batch)
        context = read_context(self.model.backbone, windows.context_BN)
        scores = self.model.scores(windows, targets, context)
        labels = None if self.loss == "hard" else self._labels(batch.soft, windows, context, targets)
        rows, measured = targets[..., 0].numel(), measured_windows(targets.shape[1])
        part = ChunkLoss(self.model, scores, windows, targets, labels, measured)
        size = max(1, self.chunk // windows.k)
        loss, nll_RK, right_RK = loss_in_chunks(part, part.states, scores.head, size)
        if batch.on_policy_B is not None and not batch.on_policy_B.all():
            off_policy_B = (
                ~batch.on_policy_B
            )  # the student's own tokens are the ones that it draws: a match says nothing
            right_RK = right_RK[off_policy_B.repeat_interleave(len(measured))]
            nll_RK = nll_RK[off_policy_B.repeat_interleave(targets.shape[1])]
        return block_sums(loss, rows, right_RK, nll_RK)

    def _targets(self, batch: WindowBatch) -> Tensor:
        """The teacher's tokens, and in on-policy sequences the student's own: (B, W, K) int64."""
        if batch.on_policy_B is None:
            return batch.targets_BWK
        with torch.no_grad():  # of all sequences, so that every rank gathers the same parameters under ZeRO 3
            own = self.model.tokens(batch.windows)
        return torch.where(batch.on_policy_B[:, None, None], own, batch.targets_BWK)

    def _labels(self, soft: SoftTargets | None, windows: Windows, context: Context, targets_BWK: Tensor) -> Labels:
        """The labels that come with the rollouts, or whole distributions of the AR model inside the student."""
        if soft is not None:
            return soft.rows
        assert self.model.config.design.exact_trunk, "no labels in the rollouts, and no AR model in the student"
        backbone = self.model.backbone
        with torch.no_grad():
            states_RKD = ar_block_states(backbone, context, windows.anchors_BW, targets_BWK).flatten(0, 1)

        def local(rows: slice) -> SoftTargets:
            with torch.no_grad():
                return SoftTargets(lm_head(backbone, states_RKD[rows]).float().log_softmax(dim=-1)[None])

        return local


Labels = Callable[[slice], SoftTargets]
"""A slice of the R windows of the batch → the teacher's distributions at their targets, (1, r, K, …)."""


def measured_windows(windows: int) -> range:
    """The windows of each sequence on which match is measured, when a sequence has so many."""
    return range(min(MATCH_STRIDE, windows) // 2, windows, MATCH_STRIDE)


class ChunkLoss:
    """Loss, NLL and matches of a slice of the windows, computed from their states; `loss_in_chunks` calls it.

    Args:
        model: the student.
        scores: of all windows.
        windows: all windows; here they are R = B · W rows.
        targets_BWK: int64 tokens.
        labels: soft targets; None when the tokens are the targets.
        measured: the windows of each sequence on which match is measured.
    """

    def __init__(
        self,
        model: PushForwardLM,
        scores: BlockScores,
        windows: Windows,
        targets_BWK: Tensor,
        labels: Labels | None,
        measured: range,
    ):
        self.model, self.head, self.labels, self.measured = model, scores.head, labels, measured
        self.states = [states.flatten(0, 1) for states in (scores.states_BWKD, *scores.side_states)]
        """The tensors that `loss_in_chunks` slices: (R, K, D), and (R, K − 1, D) for each of the side states."""
        self.targets_RK = targets_BWK.flatten(0, 1)
        self.noise_RK = windows.noise_BWK.flatten(0, 1)
        self.temperature_R = windows.temperature_BW.flatten()
        self.width = targets_BWK.shape[1]
        rows = torch.arange(len(self.targets_RK), device=targets_BWK.device).view(-1, self.width)
        self.measured_rows = rows[:, measured.start :: measured.step].flatten()

    def __call__(self, rows: slice, states_RKD: Tensor, *side_states: Tensor) -> tuple[Tensor, ...]:
        """Loss and figures of r rows, of which match is measured on s.

        Returns:
            (r,) loss with gradient, (r, K) NLL of the targets, and (s, K) bool, whether the drawn tokens are the targets.
        """
        targets, logits = self.targets_RK[rows], self.head(states_RKD).float()
        soft = None if self.labels is None else self.labels(rows)
        token_loss_RK = _token_loss(logits, targets, soft)
        loss_R = token_loss_RK.sum(dim=-1)
        later = None if soft is None else soft.after_first()
        for states in side_states:
            side_RK = _token_loss(self.head(states), targets[:, 1:], later)
            loss_R = loss_R + self.model.config.design.sequential.side_weight * side_RK.sum(dim=-1)
        with torch.no_grad():  # last, so that a second computation for the gradients can stop before it
            nll_RK = token_loss_RK.detach() if soft is None else target_nll(logits, targets)
            return loss_R, nll_RK, self._right(logits, rows)

    def _right(self, logits_RKV: Tensor, rows: slice) -> Tensor:
        here = self.measured_rows[self._measured_before(rows.start) : self._measured_before(rows.stop)]
        noise = self.noise_RK[here]
        temperature = self.temperature_R[here, None].expand_as(noise)
        return self.model.readout.pick(logits_RKV[here - rows.start], noise, temperature) == self.targets_RK[here]

    def _measured_before(self, row: int) -> int:
        """Number of measured windows before a row, computed on the host without waiting for the device."""
        sequences, window = divmod(row, self.width)
        return sequences * len(self.measured) + len(range(self.measured.start, window, self.measured.step))


def _token_loss(logits_RKV: Tensor, targets_RK: Tensor, soft: SoftTargets | None) -> Tensor:
    return target_nll(logits_RKV, targets_RK) if soft is None else soft_target_kl(logits_RKV[None], soft)[0]


class ARStep(nn.Module):
    """The next-token loss of a micro-batch of token blocks; logits of `chunk` tokens exist at the same time."""

    def __init__(self, model: PreTrainedModel, chunk: int = CHUNK):
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: TokenBatch) -> LossSums:
        """Sums of the next-token loss over the blocks."""
        return next_token_loss(self.model, batch.tokens_BN, self.chunk)
