"""Training that has gone wrong stops at once: figures that are not finite, or a loss that explodes.

Every step is checked, weights included, so each checkpoint is a good one, and nothing broken is exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.config.schema import TrainConfig


class Diverged(RuntimeError):
    """Training cannot go on; the text says what was found."""


@dataclass(frozen=True)
class StepFigures:
    """What a step says about the health of training, over all ranks."""

    loss: float
    """Mean over the target tokens of the step, in nats."""
    gradient: float
    """Norm of the gradient; negative, infinite or NaN where it is not finite (DeepSpeed has several words for that)."""
    weights: float
    """Norm of the trained weights after the step."""

    def check(self, max_loss: float) -> None:
        """Raise Diverged unless all figures are finite and the loss is at most `max_loss`."""
        if not math.isfinite(self.loss):
            raise Diverged(f"the loss is {self.loss}")
        if self.loss > max_loss:
            raise Diverged(f"the loss has exploded to {self.loss:.4g} nats a token (train.max_loss={max_loss:g})")
        if not math.isfinite(self.gradient) or self.gradient < 0:
            raise Diverged("the gradient is not finite")
        if not math.isfinite(self.weights):
            raise Diverged("the update made weights that are not finite")


def explain(error: Diverged, step: int, train: TrainConfig, store: tuple[str, int], checkpoint: str | None) -> str:
    """One line for people: the step, the cause, the rows, the last good checkpoint and what to do.

    Args:
        error: what was found.
        step: number of the step, from 0.
        train: settings of the training.
        store: folder of the token store, and the seed of its order.
        checkpoint: the last good checkpoint; None when there is none.
    """
    first, last = step * train.batch, (step + 1) * train.batch - 1
    return (
        f"training diverged in step {step + 1} of {train.steps}: {error}. Nothing was exported. The step was fed rows "
        f"{first} to {last} of {store[0]} in the order of seed {store[1]}. The last good checkpoint is "
        f"{checkpoint or 'none'}. {_advice(train)}, and run the command again: with other settings the stage starts at step 1"
    )


def _advice(train: TrainConfig) -> str:
    """The settings whose change can help, with the values that they have."""
    rates = f"train.lr (it is {train.lr:g})"
    if train.muon_lr:
        rates = f"train.muon_lr (it is {train.muon_lr:g}) and {rates}"
    remedies = [f"lower this stage's {rates}"]
    if not train.muon_lr and not 0 < train.clip <= 1:
        remedies.append(f"set its train.clip=1 (it is {train.clip:g})")
    if train.precision != "fp32":
        remedies.append(f"set its train.precision=fp32 (it is {train.precision})")
    text = " or ".join(remedies)
    return text[0].upper() + text[1:]
