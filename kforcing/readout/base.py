"""The read-out: how one forward pass becomes k tokens. A seam with two sides:

    ArgmaxReadout (here)           hint j carries z_j through the network; token j is the argmax of its logits
    SequentialReadout              hints carry no noise; a small head turns their states into explicit distributions,
    (sequential.py)                one after the other, and a coupling draws from them outside the network

Whoever trains, evaluates or decodes uses `Readout`'s methods and does not ask which side it is.

Shapes: B batch, N context, W windows, P committed tokens, K tokens to make, D width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import BlockReader, Reader
from kforcing.attention.windows import Context, Windows, read_context
from kforcing.design import Design


@dataclass(frozen=True)
class BlockScores:
    """What every token of the windows' blocks is read from, before the LM head: logits are made on demand."""

    states_BWKD: Tensor
    """Final states; `head` makes token j's logits of row j."""
    head: nn.Module
    """(..., D) states → (..., V) logits."""
    side_states: tuple[Tensor, ...] = ()
    """Further (B, W, K − 1, D) states for tokens 2 … K, whose logits training should also bring near the targets."""

    @property
    def logits_BWKV(self) -> Tensor:
        """What token j is read from, all of it at once."""
        return self.head(self.states_BWKD)

    @property
    def side(self) -> tuple[Tensor, ...]:
        """The (B, W, K − 1, V) logits of the side states."""
        return tuple(self.head(states) for states in self.side_states)


class Draw(NamedTuple):
    """What one step of decoding makes of the windows' noise."""

    tokens_BWK: Tensor
    """int64 token ids."""
    logits_BWKV: Tensor
    """What each was read from."""


Pick = Callable[[Tensor, int], Tensor]
"""(B, W, V) logits and the offset of their token in the block → (B, W) int64 tokens."""

Turn = tuple[Tensor, Tensor]
"""(B, W, V) logits of one offset and the (B, W) tokens picked from them."""


class Student(Protocol):
    """What decoding needs of a push-forward student: `kforcing.modeling.PushForwardLM` has it."""

    backbone: Any
    readout: Any

    @property
    def k(self) -> int:
        """Tokens of one forward pass."""
        ...

    @property
    def design(self) -> Design:
        """Read-out and coupling."""
        ...


def as_student(model: nn.Module) -> Student | None:
    """The model itself if it is a push-forward student, None for a plain causal LM."""
    return cast(Student, model) if hasattr(model, "readout") else None


class Readout(nn.Module):
    """From windows to blocks of tokens, around a backbone that the caller owns."""

    @abstractmethod
    def start(self, backbone: PreTrainedModel) -> None:
        """Set new weights to what suits the backbone, before any training."""

    @abstractmethod
    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """What every token of given blocks is read from (teacher-forced where that depends on the tokens before).

        `context` is the pass over `windows.context_BN`, when the caller has it already.
        """

    @abstractmethod
    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """(..., V) logits of `scores` and their (...) noise → (...) tokens."""

    @abstractmethod
    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """One step of decoding, offset by offset; `reader` reads `windows.prefix_BWP` and hints after the context.

        `known_BWD` are the trunk's states at the anchors, for windows without committed tokens.
        """

    def draw(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Draw:
        """One step of decoding: the tokens that the windows' noise maps to."""
        context, reader = open_windows(backbone, windows, context)

        def pick(logits_BWV: Tensor, offset: int) -> Tensor:
            return self.pick(logits_BWV, windows.noise_BWK[..., offset], windows.temperature_BW)

        turns = self.turns(backbone, windows, reader, context.at(windows.anchors_BW), pick)
        logits, tokens = zip(*turns, strict=True)
        return Draw(torch.stack(tokens, dim=2), torch.stack(logits, dim=2))

    def tokens(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Tensor:
        """The (B, W, K) tokens of `draw` alone.

        Overridden where windows are many: the network reads all of them at once, `CHUNK` tokens' logits exist at a time.
        """
        return self.draw(backbone, windows, context).tokens_BWK

    @abstractmethod
    def grow(self, k: int) -> None:
        """Become the read-out of another k with the same weights, as far as there are such."""


def open_windows(backbone: PreTrainedModel, windows: Windows, context: Context | None) -> tuple[Context, BlockReader]:
    """The pass over the windows' context, made here unless the caller has it, and a reader of their blocks behind it."""
    context = context or read_context(backbone, windows.context_BN)
    return context, BlockReader(backbone.base_model, context.layers, windows.anchors_BW)
