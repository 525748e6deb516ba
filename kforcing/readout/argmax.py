"""The paper's read-out: hint j carries z_j through the network, and token j is the argmax of its logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import Reader
from kforcing.attention.windows import Context, Windows
from kforcing.backbone import embeddings, head, lm_head
from kforcing.chunking import CHUNK, in_chunks
from kforcing.design import NoiseConfig
from kforcing.readout.base import BlockScores, Pick, Readout, Turn, open_windows


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
        x = self.project(features.to(self.project.bias.dtype))
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
        """Give new hints the standard deviation of the token embeddings."""
        self.noise_encoder.rescale(embeddings(backbone).weight.float().std().item())

    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """Implements `Readout.scores`: p_j(· | context, z_1 … z_j). The given tokens have no effect."""
        _, reader = open_windows(backbone, windows, context)
        return BlockScores(self._states(backbone, windows, reader), head(backbone))

    def tokens(self, backbone: PreTrainedModel, windows: Windows, context: Context | None = None) -> Tensor:
        """Implements `Readout.tokens`."""
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
        """The likeliest token. The noise is not used, because the network has read it."""
        return logits.argmax(dim=-1)

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """Implements `Readout.turns`: one pass gives all k tokens."""
        logits_BWKV = lm_head(backbone, self._states(backbone, windows, reader))
        for offset, logits_BWV in enumerate(logits_BWKV.unbind(2)):
            yield logits_BWV, pick(logits_BWV, offset)

    def grow(self, k: int) -> None:
        """Implements `Readout.grow`. No weight depends on k: hints differ by position and noise alone."""
