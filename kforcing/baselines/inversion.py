"""Noise inversion: a student learns the map from noise to tokens on real text, without rollouts.

For a real token x after a real context, z is drawn uniformly inside the bin that the AR model's CDF gives to x. Then
(context, z) → x is a pair to learn from. The z of all tokens are uniform exactly when the AR model is the distribution of
the data. A batch takes one forward pass of the AR model. Two students learn from the same pairs (ablations of K-Forcing,
Table 2):

    causal   the paper's own student, which reads the hints one after the other (B)
    heads    a common multi-token architecture: one hint that carries all k noises, and k separate heads (A)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing.attention.reader import BlockReader, Reader, ar_block_logits
from kforcing.attention.windows import Context, Windows, read_context
from kforcing.backbone import embeddings, head, lm_head
from kforcing.baselines.base import TextWindows
from kforcing.design import NoiseConfig
from kforcing.distillation.losses import LossSums, hard_target_loss
from kforcing.modeling import PushForwardLM
from kforcing.readout.base import BlockScores, Pick, Readout, Turn


def invert(logits: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Noise that `inverse_cdf` maps to given tokens: F(x − 1) + u · p(x), which is uniform in the token's bin for uniform u.

    Args:
        logits: (..., V).
        tokens: (...) int64.
        u: (...) uniform in (0, 1).
    Returns:
        (...) float64 in (0, 1).
    """
    p = logits.double().softmax(dim=-1)
    upper = p.cumsum(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return (upper - (1 - u) * p.gather(-1, tokens[..., None]).squeeze(-1)).clamp(1e-15, 1 - 1e-15)


class InversionStep(nn.Module):
    """The loss of a student on real text with inverted noise."""

    def __init__(self, student: PushForwardLM, teacher: PreTrainedModel):
        super().__init__()
        self.student = student
        self._teacher = (teacher.requires_grad_(False),)  # a tuple hides its parameters from the optimiser

    def forward(self, batch: TextWindows) -> LossSums:
        """−log p_j(real token), summed over windows and offsets."""
        tokens_BWK = batch.following_BWK
        with torch.no_grad():
            context = read_context(self._teacher[0], batch.tokens_BN)
            logits = ar_block_logits(self._teacher[0], context, batch.anchors_BW, tokens_BWK)
            noise_BWK = invert(logits, tokens_BWK, batch.noise_BWK)
        temperature_B = torch.ones(len(tokens_BWK), device=tokens_BWK.device)
        windows = Windows(batch.tokens_BN, batch.anchors_BW, noise_BWK, temperature_B)
        scores = self.student.scores(windows, tokens_BWK)
        return hard_target_loss(scores.head, scores.states_BWKD, tokens_BWK)


class HeadsReadout(Readout):
    """One hint that carries all k noises, and k heads on its state. The argmax of each head is its token."""

    def __init__(self, backbone: PreTrainedModel, k: int, noise: NoiseConfig):
        super().__init__()
        width = embeddings(backbone).weight.shape[1]
        self.k, self.noise = k, noise
        self.project = nn.Linear(k * width, width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = silent_heads(width, k)

    def start(self, backbone: PreTrainedModel) -> None:
        """Do nothing: new heads already compute what the shared LM head computes."""

    def encode(self, noise_BWK: Tensor) -> Tensor:
        """(B, W, k) noise → one (B, W, 1, D) hint: the sinusoids of all z, then a residual MLP."""
        half = self.project.out_features // 2
        low, high = math.log(self.noise.min_cycles), math.log(self.noise.max_cycles)
        cycles = torch.linspace(low, high, half, device=noise_BWK.device).exp() * (2 * math.pi)
        angle = noise_BWK.float()[..., None] * cycles
        x = self.project(torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(self.project.weight.dtype))
        return (x + self.down(nn.functional.gelu(self.up(self.norm(x)))))[:, :, None]

    def scores(
        self, backbone: PreTrainedModel, windows: Windows, tokens_BWK: Tensor, context: Context | None = None
    ) -> BlockScores:
        """p_j(· | context, z_1 … z_k)."""
        context = context or read_context(backbone, windows.context_BN)
        reader = BlockReader(backbone.base_model, context.layers, windows.anchors_BW)
        return BlockScores(self._states(backbone, windows, reader), head(backbone))

    def _states(self, backbone: PreTrainedModel, windows: Windows, reader: Reader) -> Tensor:
        if windows.k != self.k:
            raise ValueError(
                f"k={windows.k}: the hint of this student carries exactly {self.k} noises; decode it with k={self.k}"
            )
        block = self.encode(windows.noise_BWK)
        if windows.prefix_BWP is not None:
            block = torch.cat([embeddings(backbone)(windows.prefix_BWP), block], dim=2)
        state_BWD = reader.read(block)[:, :, -1]
        return torch.stack([state_BWD + nn.functional.silu(part(state_BWD)) for part in self.heads], dim=2)

    def pick(self, logits: Tensor, z: Tensor, temperature: Tensor | float) -> Tensor:
        """The most likely token."""
        return logits.argmax(dim=-1)

    def turns(
        self, backbone: PreTrainedModel, windows: Windows, reader: Reader, known_BWD: Tensor | None, pick: Pick
    ) -> Iterator[Turn]:
        """All k tokens from one pass."""
        for offset, logits_BWV in enumerate(lm_head(backbone, self._states(backbone, windows, reader)).unbind(2)):
            yield logits_BWV, pick(logits_BWV, offset)

    def grow(self, k: int) -> None:
        """Not possible: each head belongs to one k."""
        raise NotImplementedError


def silent_heads(width: int, n: int) -> nn.ModuleList:
    """n linear maps that start with zeros, so that untrained residual heads compute what the shared LM head computes."""
    heads = nn.ModuleList()
    for _ in range(n):
        part = nn.Linear(width, width)
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
        heads.append(part)
    return heads


def with_heads(student: PushForwardLM) -> PushForwardLM:
    """Architecture A: the student with its backbone, and with `HeadsReadout` as its read-out."""
    readout = HeadsReadout(student.backbone, student.k, student.config.design.noise)
    parameter = next(student.parameters())
    student.readout = readout.to(parameter.device, parameter.dtype)  # type: ignore[assignment]
    return student
