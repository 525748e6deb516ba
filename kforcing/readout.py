"""The read-out: how one forward pass becomes k tokens. A seam with two sides:

    ArgmaxReadout (here)           hint j carries z_j through the network; token j is the argmax of its logits
    SequentialReadout              hints carry no noise; a small head turns their states into explicit distributions,
    (sequential.py)                one after the other, and a coupling draws from them outside the network

Whoever trains, evaluates or decodes uses `Readout`'s methods and does not ask which side it is.

Shapes: B batch, N context, W windows, P committed tokens, K tokens to make, D width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.losses import CHUNK
from kforcing.recompute import in_chunks
from kforcing.staircase import BlockReader, Context, Reader, Windows, embeddings, head, lm_head, read_context


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


@dataclass(frozen=True)
class NoiseConfig:
    """How a hint's noise enters the network."""

    min_cycles: float = 1e-4
    """Lowest frequency of the sinusoids of z, in cycles over [0, 1)."""
    max_cycles: float = 1.0
    """Highest frequency of the sinusoids of z, in cycles over [0, 1). The paper's release stops at 1."""
    temperature_min: float = 1.0
    """Lowest temperature rollouts are sampled at, and an argmax student is trained for."""
    temperature_max: float = 1.0
    """Highest such temperature; equal to the lowest for a student of one temperature."""

    def check(self) -> None:
        """Raise ValueError unless both ranges are positive and in order."""
        if not 0 < self.min_cycles < self.max_cycles:
            raise ValueError(f"noise cycles must satisfy 0 < min < max, got {self.min_cycles} and {self.max_cycles}")
        if not 0 < self.temperature_min <= self.temperature_max:
            raise ValueError(
                f"temperatures must satisfy 0 < min ≤ max, got {self.temperature_min} and {self.temperature_max}"
            )

    def clamp(self, temperature: float) -> float:
        """The temperature nearest to the given one that the student is trained for."""
        return min(max(temperature, self.temperature_min), self.temperature_max)


class NoiseEncoder(nn.Module):
    """(z, τ) → hint embedding: sinusoids of both → Linear(2·width → width) → x + MLP(LN(x)), MLP 4× with GELU."""

    def __init__(self, width: int, config: NoiseConfig):
        super().__init__()
        if width % 2:
            raise ValueError(f"the noise encoder needs an even width, the backbone has {width}")
        self.config = config
        self.project = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, noise: Tensor, temperature: Tensor) -> Tensor:
        """(...) noise in [0, 1) and (...) temperatures → (..., width), in the dtype of the weights."""
        half = self.project.out_features // 2
        low, high = math.log(self.config.min_cycles), math.log(self.config.max_cycles)
        cycles = torch.linspace(low, high, half, device=noise.device).exp() * (2 * math.pi)
        z_angle = noise.float()[..., None] * cycles
        t_angle = temperature.float()[..., None] * cycles
        features = torch.cat([z_angle.sin(), z_angle.cos(), t_angle.sin(), t_angle.cos()], dim=-1)
        x = self.project(features.to(self.project.weight.dtype))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    @torch.no_grad()
    def rescale(self, spread: float) -> None:
        """Scale the last linear maps so that hints have the given standard deviation over z."""
        probe = torch.linspace(0, 1, 257, device=self.project.weight.device)[:-1]
        factor = spread / self(probe, torch.ones_like(probe)).std().item()
        for layer in (self.project, self.down):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)


class ArgmaxReadout(Readout):
    """K-Forcing's read-out: hint j carries z_j, sees the context and hints 1..j, and its argmax is token j."""

    def __init__(self, backbone: PreTrainedModel, noise: NoiseConfig):
        super().__init__()
        self.noise_encoder = NoiseEncoder(embeddings(backbone).weight.shape[1], noise)

    def start(self, backbone: PreTrainedModel) -> None:
        """Make new hints look like tokens to the first layer."""
        self.noise_encoder.rescale(embeddings(backbone).weight.float().std().item())

    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """p_j(· | context, z_1 … z_j): the tokens do not matter here."""
        _, reader = open_windows(backbone, windows, context)
        return BlockScores(self._states(backbone, windows, reader), head(backbone))

    def tokens(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Tensor:
        """See `Readout.tokens`."""
        _, reader = open_windows(backbone, windows, context)
        states_RKD = self._states(backbone, windows, reader).flatten(0, 1)
        likeliest = lambda rows: (lm_head(backbone, states_RKD[rows]).argmax(dim=-1),)  # noqa: E731
        (tokens_RK,) = in_chunks(likeliest, len(states_RKD), max(1, CHUNK // windows.k))
        return tokens_RK.view(windows.noise_BWK.shape)

    def _states(self, backbone: PreTrainedModel, windows: Windows, reader: Reader) -> Tensor:
        noise_BWK = windows.noise_BWK
        block = self.noise_encoder(noise_BWK, windows.temperature_B[:, None, None].expand_as(noise_BWK))
        if windows.prefix_BWP is not None:
            block = torch.cat([embeddings(backbone)(windows.prefix_BWP), block], dim=2)
        return reader.read(block)[:, :, -windows.k :]

    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """The likeliest token; the noise has done its work inside the network."""
        return logits.argmax(dim=-1)

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """All k tokens from one pass."""
        logits_BWKV = lm_head(backbone, self._states(backbone, windows, reader))
        for offset, logits_BWV in enumerate(logits_BWKV.unbind(2)):
            yield logits_BWV, pick(logits_BWV, offset)

    def grow(self, k: int) -> None:
        """Nothing to do: hints differ by position and noise alone."""
