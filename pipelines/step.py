"""One optimiser step: what a batch is, what each kind of stage computes from it, and how its loss is normalised.

Global-token normalisation. Every rank sums its loss over its own tokens; the gradient we want is that of
(sum over all ranks) / (tokens of all ranks). DeepSpeed divides a micro-batch's loss by the number of accumulated
micro-batches and averages gradients over ranks, so each local sum is multiplied by

    world size × micro-batches / tokens of the whole step on all ranks.

Then neither the number of ranks, nor accumulation, nor ranks with different numbers of tokens change the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.losses import LossSums, hard_target_loss, next_token_loss
from kforcing.model import PushForwardLM
from kforcing.noise import window_noise
from pipelines.store import to_numpy


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

    tokens_BN: Tensor
    anchors_BW: Tensor
    noise_BWK: Tensor
    temperature_B: Tensor
    targets_BWK: Tensor

    @property
    def target_tokens(self) -> int:
        """Tokens the loss is summed over."""
        return self.targets_BWK.numel()


def to_batch(table: pa.Table, device: torch.device | str) -> TokenBatch | WindowBatch:
    """Rows of a token store or of rollouts, as tensors; the noise is recomputed from its key."""

    def column(name: str, dtype: Any = np.int64) -> Tensor:
        return torch.from_numpy(to_numpy(table[name]).astype(dtype)).to(device)

    tokens = column("tokens")
    if "targets" not in table.column_names:
        return TokenBatch(tokens)
    anchors = column("anchors")
    targets = column("targets").unflatten(1, (anchors.shape[1], -1))
    noise = window_noise(column("noise_key"), column("seq"), anchors, targets.shape[2])
    return WindowBatch(tokens, anchors, noise, column("temperature", np.float32), targets)


class StudentStep(nn.Module):
    """The push-forward loss of a micro-batch of rolled-out windows."""

    def __init__(self, model: PushForwardLM):
        super().__init__()
        self.model = model

    def forward(self, batch: WindowBatch) -> LossSums:
        """Sums of the hard-target loss over the windows."""
        logits = self.model.window_logits(
            batch.tokens_BN, batch.anchors_BW, batch.noise_BWK, temperature_B=batch.temperature_B
        )
        return hard_target_loss(logits, batch.targets_BWK)


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
    packed = torch.cat(
        [sums.nll_K, sums.match_K, sums.block[None], torch.tensor([float(sums.windows)], device=sums.nll_K.device)]
    ).double()
    dist.all_reduce(packed)
    values = packed.tolist()
    windows = values[-1]
    return {
        "loss": sum(values[:K]) / (windows * K),
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
