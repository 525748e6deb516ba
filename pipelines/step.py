"""One optimiser step: what a batch is, what each kind of stage computes from it, and how its loss is normalised.

Global-token normalisation. Every rank sums its loss over its own tokens; the gradient we want is that of
(sum over all ranks) / (tokens of all ranks). DeepSpeed divides a micro-batch's loss by the number of accumulated
micro-batches and averages gradients over ranks, so each local sum is multiplied by

    world size × micro-batches / tokens of the whole step on all ranks.

Then neither the number of ranks, nor accumulation, nor ranks with different numbers of tokens change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.losses import LossSums, SoftTargets, block_sums, next_token_loss, soft_target_kl, target_nll
from kforcing.model import PushForwardLM
from kforcing.noise import uniform, window_noise
from kforcing.readout import BlockScores
from kforcing.staircase import Context, Windows, ar_block_logits, read_context
from pipelines.store import to_numpy

# Training's match is measured on every so-many-th window, since couplings over the whole vocabulary are not free.
MATCH_STRIDE = 4


@dataclass(frozen=True)
class TokenBatch:
    """Token blocks of a micro-batch, for AR training."""

    tokens_BN: Tensor

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is summed over."""
        return self.tokens_BN.shape[0] * (self.tokens_BN.shape[1] - 1)


@dataclass(frozen=True)
class WindowBatch:
    """Rolled-out windows of a micro-batch, for student training."""

    windows: Windows
    targets_BWK: Tensor
    """int64 tokens the teacher made."""
    soft: SoftTargets | None = None
    """The teacher's distributions along the targets, when rollouts ship them."""
    own_B: Tensor | None = None
    """bool, sequences whose windows the student itself rolls out anew; none when there are none."""

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is summed over."""
        return self.targets_BWK.numel()


def to_batch(table: pa.Table, device: torch.device | str, own_key: int = 0, own_share: float = 0.0) -> Any:
    """Rows of a token store or of rollouts, as a `TokenBatch` or `WindowBatch`; the noise is recomputed from its key.

    `own_share` of the sequences, chosen by their row position under `own_key`, are marked for the student to roll out.
    """

    def column(name: str, dtype: Any = np.int64) -> Tensor:
        return torch.from_numpy(to_numpy(table[name]).astype(dtype)).to(device)

    tokens = column("tokens")
    if "targets" not in table.column_names:
        return TokenBatch(tokens)
    anchors = column("anchors")
    targets = column("targets").unflatten(1, (anchors.shape[1], -1))
    noise = window_noise(column("noise_key"), column("seq"), anchors, targets.shape[2])
    windows = Windows(tokens, anchors, noise, column("temperature", np.float32))
    soft = None
    if "soft_ids" in table.column_names:
        logp, ids = column("soft_logp", np.float32), column("soft_ids")
        soft = SoftTargets(*(x.view(*targets.shape, -1) for x in (logp, ids)))
    own = uniform(own_key, column("position"), 0, torch.zeros_like(tokens[:, 0])) < own_share if own_share else None
    return WindowBatch(windows, targets, soft, own)


class StudentStep(nn.Module):
    """The push-forward loss of a micro-batch of rolled-out windows: `hard` or `soft` targets."""

    def __init__(self, model: PushForwardLM, loss: str = "hard"):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: WindowBatch) -> LossSums:
        """Sums of the loss over the windows."""
        model, windows = self.model, batch.windows
        targets = self._own_windows(batch)
        context = read_context(model.backbone, windows.context_BN)
        scores = model.scores(windows, targets, context)
        nll = target_nll(scores.logits_BWKV, targets)
        if self.loss == "hard":
            loss = nll.sum() + self._side(scores, lambda logits: target_nll(logits, targets[..., 1:]))
        else:
            soft = batch.soft or self._local_targets(windows, context, targets)
            later = soft.after_first()
            loss = soft_target_kl(scores.logits_BWKV, soft).sum()
            loss = loss + self._side(scores, lambda logits: soft_target_kl(logits, later))
        some = slice(min(MATCH_STRIDE, nll.shape[1]) // 2, None, MATCH_STRIDE)
        noise, temperature = windows.noise_BWK[:, some], windows.temperature_BW[:, some, None]
        with torch.no_grad():
            picked = model.readout.pick(scores.logits_BWKV[:, some], noise, temperature.expand_as(noise))
        right, windows_here = picked == targets[:, some], nll[..., 0].numel()
        if batch.own_B is not None and not batch.own_B.all():  # a student's own tokens always match its noise
            return block_sums(loss, windows_here, right[~batch.own_B], nll.detach()[~batch.own_B])
        return block_sums(loss, windows_here, right, nll.detach())

    def _own_windows(self, batch: WindowBatch) -> Tensor:
        if batch.own_B is None:
            return batch.targets_BWK
        with torch.no_grad():  # all sequences, so that every rank gathers the same parameters under ZeRO 3
            own = self.model.draw(batch.windows).tokens_BWK
        return torch.where(batch.own_B[:, None, None], own, batch.targets_BWK)

    @torch.no_grad()
    def _local_targets(self, windows: Windows, context: Context, targets_BWK: Tensor) -> SoftTargets:
        """Whole distributions from the AR model inside the student."""
        assert self.model.config.design.exact_trunk, "no labels in the rollouts, and no AR model in the student"
        logits = ar_block_logits(self.model.backbone, context, windows.anchors_BW, targets_BWK)
        return SoftTargets(logits.log_softmax(dim=-1))

    def _side(self, scores: BlockScores, loss: Callable[[Tensor], Tensor]) -> Tensor | float:
        weight = self.model.config.design.sequential.side_weight
        return sum((weight * loss(logits).sum() for logits in scores.side), 0.0)


class ARStep(nn.Module):
    """The next-token loss of a micro-batch of token blocks."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> LossSums:
        """Sums of the next-token loss over the blocks."""
        return next_token_loss(self.model, batch.tokens_BN)


def optimizer_step(engine: Any, micro_batches: Sequence[TokenBatch | WindowBatch]) -> LossSums:
    """Forward, backward and update over accumulated micro-batches; returns this rank's sums."""
    tokens = torch.tensor(float(sum(b.target_tokens for b in micro_batches)), device=engine.device)
    dist.all_reduce(tokens)
    scale = dist.get_world_size() * len(micro_batches) / tokens.item()
    total: LossSums | None = None
    for batch in micro_batches:
        sums = engine(batch)
        engine.backward(sums.loss * scale)
        engine.step()
        sums.loss = sums.loss.detach()
        total = sums if total is None else total + sums
    assert total is not None
    return total


def reduce_sums(sums: LossSums) -> dict[str, Any]:
    """Means over all ranks: loss, per-offset NLL and match, block match, target tokens."""
    K = len(sums.nll_K)
    scalars = torch.stack([sums.block, sums.loss.detach(), torch.full_like(sums.block, float(sums.windows))])
    packed = torch.cat([sums.nll_K, sums.match_K, scalars]).double()
    dist.all_reduce(packed)
    *values, loss, windows = packed.tolist()
    return {
        "loss": loss / (windows * K),
        "nll": [v / windows for v in values[:K]],
        "match": [v / windows for v in values[K : 2 * K]],
        "block_match": values[2 * K] / windows,
        "tokens": int(windows * K),
    }


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up, then constant or cosine down to a tenth of the peak; a pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)))
