"""What changes with the step number: the learning rate, the decay of the weights' average, and the on-policy fraction.

All are pure functions of the step, so a resumed stage continues with the same values.
"""

from __future__ import annotations

import math
from typing import Any

from pipelines.config.schema import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of a step: a linear warm-up to `lr`, then constant or a cosine down to a tenth of it."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rates(groups: list[dict[str, Any]], step: int, train: TrainConfig, muon: bool = False) -> None:
    """Set the learning rate of an optimiser's groups for a step.

    Args:
        muon: whether all of them are Muon's; DeepSpeed marks groups of its own by `use_muon`.
    """
    lr = learning_rate(step, train)
    for group in groups:
        group["lr"] = lr * train.muon_lr / train.lr if train.muon_lr and group.get("use_muon", muon) else lr


def ema_decay(step: int, limit: float) -> float:
    """The decay of the exponential moving average at a step: min(limit, (1 + step) / (10 + step)).

    Early steps have a smaller decay, so the average forgets the weights that the stage began with.
    """
    return min(limit, (1 + step) / (10 + step))


def on_policy_fraction(step: int, train: TrainConfig) -> float:
    """Fraction of a step's sequences whose targets the student makes itself; 0 before `on_policy_from` of the steps."""
    return train.on_policy_fraction if step >= train.on_policy_from * train.steps else 0.0
