"""The interface of a read-out, which turns the states of one forward pass into k tokens. It has two implementations:

    argmax.py       ArgmaxReadout: hint j carries z_j through the network, and token j is the argmax of its logits
    sequential.py   SequentialReadout: hints carry no noise. A small head turns their states into explicit distributions, one
                    token after the other, and a coupling draws from each of them outside the network

Training, evaluation and decoding call the methods of `Readout` and need not know which of the two it is.

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
    """The states from which every token of the windows' blocks is read. Logits are computed on demand.

    Row j of the states gives the logits of token j.
    """

    states_BWKD: Tensor
    """Final states, before the LM head."""
    head: nn.Module
    """(..., D) states → (..., V) logits."""
    side_states: tuple[Tensor, ...] = ()
    """Further (B, W, K − 1, D) states for tokens 2 … K. Training brings their logits near the targets as well."""

    @property
    def logits_BWKV(self) -> Tensor:
        """The logits of all tokens at once."""
        return self.head(self.states_BWKD)

    @property
    def side(self) -> tuple[Tensor, ...]:
        """The (B, W, K − 1, V) logits of the side states."""
        return tuple(self.head(states) for states in self.side_states)


class Draw(NamedTuple):
    """The result of one step of decoding."""

    tokens_BWK: Tensor
    """int64 token ids."""
    logits_BWKV: Tensor
    """The logits from which each token was picked."""


Pick = Callable[[Tensor, int], Tensor]
"""(B, W, V) logits and the offset of their token in the block → (B, W) int64 tokens."""

Turn = tuple[Tensor, Tensor]
"""(B, W, V) logits of one offset and the (B, W) tokens picked from them."""


class Student(Protocol):
    """The attributes of a push-forward student that decoding uses. `kforcing.modeling.PushForwardLM` has them."""

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
    """Maps windows to blocks of tokens. The backbone belongs to the caller and is passed to every method."""

    @abstractmethod
    def start(self, backbone: PreTrainedModel) -> None:
        """Set the weights of a new read-out to values that suit the backbone, before any training."""

    @abstractmethod
    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """The states from which every token of given blocks is read.

        Where they depend on the tokens before, those of the given blocks are used (teacher forcing).

        Args:
            tokens_BWK: int64 token ids of the blocks.
            context: the pass over `windows.context_BN`, when the caller has made it already.
        """

    @abstractmethod
    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """(..., V) logits of `scores` and their (...) noise → (...) tokens."""

    @abstractmethod
    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """One step of decoding, offset by offset.

        Args:
            reader: reads `windows.prefix_BWP` and hints after the context.
            known_BWD: states of the backbone at the anchors, for windows without committed tokens.
            pick: chooses a token from its logits and its offset.
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
        """The (B, W, K) int64 tokens of `draw`, without its logits.

        The read-outs override it for many windows: the network reads all windows at once, and then the logits of `CHUNK`
        tokens exist at a time.
        """
        return self.draw(backbone, windows, context).tokens_BWK

    @abstractmethod
    def grow(self, k: int) -> None:
        """Become the read-out of another k. Weights that both have are kept."""


def open_windows(backbone: PreTrainedModel, windows: Windows, context: Context | None) -> tuple[Context, BlockReader]:
    """The pass over the windows' context, which is made when `context` is None, and a reader of their blocks after it."""
    context = context or read_context(backbone, windows.context_BN)
    return context, BlockReader(backbone.base_model, context.layers, windows.anchors_BW)
