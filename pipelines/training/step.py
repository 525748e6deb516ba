"""One optimiser step: its micro-batches, and the normalisation of the loss.

Global-token normalisation. Every rank sums its loss over its own tokens. The gradient that we want is that of
(sum over all ranks) / (tokens of all ranks). DeepSpeed divides the loss of a micro-batch by the number of accumulated
micro-batches and averages gradients over ranks, so each local sum is multiplied by

    world size × micro-batches / tokens of the whole step on all ranks.

The gradient then does not depend on the number of ranks, on accumulation, or on how tokens are spread over ranks.

Shapes: K tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from kforcing.distillation.losses import LossSums
from kforcing.distillation.steps import TokenBatch, WindowBatch
from kforcing.distillation.text import TextBatch
from kforcing.keys import derive_key
from kforcing.noise import sample_anchors, uniform, window_noise
from pipelines.data.rows import (
    epochs_of,
    has_rollout,
    labels_of,
    positions_of,
    sequences_of,
    targets_of,
    tokens_of,
    windows_of,
)


def to_batch(
    rows: pa.Table, device: torch.device | str, on_policy_key: int = 0, on_policy_fraction: float = 0.0
) -> Any:
    """Rows of a token store as a `TokenBatch`, rolled-out rows as a `WindowBatch`.

    Args:
        rows: see `pipelines.data.rows`.
        device: of the tensors.
        on_policy_key: key that chooses on-policy sequences by the positions of their rows.
        on_policy_fraction: fraction of the sequences that the student will roll out itself.
    """
    if not has_rollout(rows):
        return TokenBatch(tokens_of(rows, device))
    on_policy = None
    if on_policy_fraction:
        positions = torch.from_numpy(positions_of(rows)).to(device)
        on_policy = uniform(on_policy_key, positions, 0, torch.zeros_like(positions)) < on_policy_fraction
    return WindowBatch(windows_of(rows, device), targets_of(rows, device), labels_of(rows, device), on_policy)


def text_batch(rows: pa.Table, device: torch.device | str, k: int, windows: int, seed: int, stage: str) -> TextBatch:
    """Rows of a token store as windows of k tokens of the text itself, chosen by (seed, stage, epoch, sequence) alone.

    Args:
        rows: see `pipelines.data.rows`; they have N tokens.
        device: of the tensors.
        k: tokens of a block.
        windows: of each row, at most N − k.
        seed, stage: name the stream of anchors and noise.
    """
    seq, epochs, tokens = sequences_of(rows), epochs_of(rows), tokens_of(rows)
    anchor_keys, noise_keys = (
        torch.tensor([derive_key(seed, stage, name, epoch) for epoch in epochs]) for name in ("anchors", "noise")
    )
    anchors = sample_anchors(anchor_keys, seq, tokens.shape[1] - k, windows)
    noise = window_noise(noise_keys, seq, anchors, k)
    return TextBatch(*(x.to(device) for x in (tokens, anchors, noise)))


def optimizer_step(engine: Any, micro_batches: Sequence[TokenBatch | WindowBatch | TextBatch]) -> LossSums:
    """Forward and backward passes over the micro-batches, and one update of the weights. Returns the sums of this rank.

    Below ZeRO 3, ranks may have different numbers of tokens. ZeRO 3 gathers the weights for each call of a module, and the
    number of calls depends on the number of tokens, so there all ranks must have the same.
    """
    tokens = torch.tensor([b.target_tokens for b in micro_batches], device=engine.device)
    every = [torch.empty_like(tokens) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tokens)
    counts = torch.stack(every).tolist()  # the only time that the host waits for the device
    assert engine.zero_optimization_stage() < 3 or all(count == counts[0] for count in counts), (
        f"ranks have micro-batches of {counts} target tokens: ZeRO 3 needs equal numbers, or ranks wait forever"
    )
    scale = len(counts) * len(micro_batches) / sum(map(sum, counts))
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
    """Means over all ranks: `loss`, `nll` and `match` by offset, `block_match`; and the number of target `tokens`.

    Collective: every rank must call it.
    """
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


def largest(value: float, device: torch.device) -> float:
    """The largest value among the ranks. Collective: every rank must call it."""
    packed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    return packed.item()
