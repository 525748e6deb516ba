"""Teacher rollouts: what k coupled tokens does the frozen teacher make of each window's noise?

Two teachers with one method each. `ARTeacher` is the AR model's own unrolled coupling (exact, the ideal student).
`StudentTeacher` is a push-forward student that makes its k tokens, commits them and makes the next k: two passes of
PFLM(k) give the targets of PFLM(2k), the paper's self-forcing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import Coupling
from kforcing.losses import SoftTargets
from kforcing.model import PushForwardLM
from kforcing.staircase import BlockReader, Windows, embeddings, lm_head, read_context


class Teacher(Protocol):
    """Anything that turns windows and noise into tokens."""

    def rollout(self, windows: Windows) -> Tensor:
        """(B, W, K) int64 tokens of the windows, coupled to their noise."""
        ...


class ARTeacher:
    """K coupled steps of an AR model: token j is coupling(p(· | context, tokens before j), z_j)."""

    def __init__(self, backbone: PreTrainedModel, coupling: Coupling):
        self.backbone, self.coupling = backbone.eval(), coupling

    def steps(self, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
        """For each offset the (B, W, V) float32 logits and the (B, W) token they give; keys and values are kept."""
        context = read_context(self.backbone, windows.context_BN)
        reader = BlockReader(self.backbone.base_model, context.layers, windows.anchors_BW)
        states_BWD = context.at(windows.anchors_BW)
        for j in range(windows.k):
            logits_BWV = lm_head(self.backbone, states_BWD).float()
            token_BW = self.coupling(logits_BWV, windows.noise_BWK[..., j], windows.temperature_BW)
            yield logits_BWV, token_BW
            if j + 1 < windows.k:
                states_BWD = reader.read(embeddings(self.backbone)(token_BW)[:, :, None])[:, :, 0]

    @torch.no_grad()
    def rollout(self, windows: Windows) -> Tensor:
        """See `Teacher.rollout`."""
        return torch.stack([token for _, token in self.steps(windows)], dim=2)

    @torch.no_grad()
    def labelled_rollout(self, windows: Windows, m: int) -> tuple[Tensor, SoftTargets]:
        """The rollout with the teacher's m likeliest tokens at each offset and their log-probabilities."""
        tokens, ids, logp = [], [], []
        for logits_BWV, token_BW in self.steps(windows):
            best = logits_BWV.log_softmax(dim=-1).topk(min(m, logits_BWV.shape[-1]), dim=-1)
            tokens.append(token_BW)
            ids.append(best.indices)
            logp.append(best.values)
        return torch.stack(tokens, dim=2), SoftTargets(torch.stack(logp, dim=2), torch.stack(ids, dim=2))


class StudentTeacher:
    """Steps of a push-forward student, each conditioned on the tokens of the steps before it."""

    def __init__(self, student: PushForwardLM, k: int | None = None):
        self.student = student.eval()
        self.k = k or student.k

    @torch.no_grad()
    def rollout(self, windows: Windows) -> Tensor:
        """See `Teacher.rollout`."""
        tokens_BWP: Tensor | None = windows.prefix_BWP
        made = []
        for noise in windows.noise_BWK.split(self.k, dim=2):
            step = dataclasses.replace(windows, noise_BWK=noise, prefix_BWP=tokens_BWP)
            made.append(self.student.draw(step).tokens_BWK)
            tokens_BWP = made[-1] if tokens_BWP is None else torch.cat([tokens_BWP, made[-1]], dim=2)
        return torch.cat(made, dim=2)
