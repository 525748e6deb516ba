"""Teacher rollouts: the frozen teacher maps the noise of each window to k target tokens.

There are two teachers. `ARTeacher` draws the tokens one after the other from the AR model by the coupling; a perfect student
would return the same tokens. `StudentTeacher` is a push-forward student that makes k tokens, appends them to the context and
makes the next k. Two passes of PFLM(k) give the targets of PFLM(2k), which is the paper's self-forcing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.attention.reader import BlockReader
from kforcing.attention.windows import Context, Windows, read_context
from kforcing.backbone import embeddings, lm_head
from kforcing.chunking import CHUNK, in_chunks
from kforcing.coupling import Coupling
from kforcing.distillation.losses import SoftTargets
from kforcing.modeling import PushForwardLM


class Teacher(Protocol):
    """Maps windows and their noise to tokens."""

    def rollout(self, windows: Windows) -> Tensor:
        """(B, W, K) int64 tokens of the windows, coupled to their noise."""
        ...


class ARTeacher:
    """K coupled steps of an AR model: token j is coupling(p(· | context, tokens before j), z_j)."""

    def __init__(self, backbone: PreTrainedModel, coupling: Coupling):
        self.backbone, self.coupling = backbone.eval(), coupling

    @torch.no_grad()
    def rollout(self, windows: Windows, context: Context | None = None) -> Tensor:
        """Implements `Teacher.rollout`; `context` is that of the windows, where it has been read already."""
        return self._unroll(windows, lambda logits: (), context)[0]

    @torch.no_grad()
    def labelled_rollout(self, windows: Windows, m: int) -> tuple[Tensor, SoftTargets]:
        """The rollout with the teacher's m likeliest tokens at each offset and their log-probabilities."""

        def label(logits_RV: Tensor) -> tuple[Tensor, ...]:
            best = logits_RV.topk(min(m, logits_RV.shape[-1]), dim=-1)
            return best.values - logits_RV.logsumexp(dim=-1, keepdim=True), best.indices

        tokens, logp, ids = self._unroll(windows, label)
        return tokens, SoftTargets(logp, ids)

    def _unroll(
        self, windows: Windows, label: Callable[[Tensor], tuple[Tensor, ...]], context: Context | None = None
    ) -> list[Tensor]:
        """(B, W, K) tokens, and the (B, W, K, …) tensors that `label` returns for the float32 logits."""
        context = context or read_context(self.backbone, windows.context_BN)
        reader = BlockReader(self.backbone.base_model, context.layers, windows.anchors_BW)
        states_BWD, shape = context.at(windows.anchors_BW), windows.anchors_BW.shape
        temperature_R = windows.temperature_BW.flatten()
        made = []
        for j in range(windows.k):
            step = partial(
                self._step, states_BWD.flatten(0, 1), windows.noise_BWK[..., j].flatten(), temperature_R, label
            )
            made.append([x.unflatten(0, shape) for x in in_chunks(step, shape.numel(), CHUNK)])
            if j + 1 < windows.k:
                states_BWD = reader.read(embeddings(self.backbone)(made[-1][0])[:, :, None])[:, :, 0]
        return [torch.stack(parts, dim=2) for parts in zip(*made, strict=True)]

    def _step(
        self,
        states_RD: Tensor,
        noise_R: Tensor,
        temperature_R: Tensor,
        label: Callable[[Tensor], tuple[Tensor, ...]],
        rows: slice,
    ) -> tuple[Tensor, ...]:
        logits = lm_head(self.backbone, states_RD[rows]).float()
        return self.coupling(logits, noise_R[rows], temperature_R[rows]), *label(logits)


class StudentTeacher:
    """Steps of a push-forward student, each conditioned on the tokens of the steps before it."""

    def __init__(self, student: PushForwardLM, k: int | None = None):
        self.student = student.eval()
        self.k = k or student.k

    @torch.no_grad()
    def rollout(self, windows: Windows) -> Tensor:
        """Implements `Teacher.rollout`."""
        context = read_context(self.student.backbone, windows.context_BN)
        tokens_BWP: Tensor | None = windows.prefix_BWP
        made = []
        for noise in windows.noise_BWK.split(self.k, dim=2):
            step = dataclasses.replace(windows, noise_BWK=noise, prefix_BWP=tokens_BWP)
            made.append(self.student.tokens(step, context))
            tokens_BWP = made[-1] if tokens_BWP is None else torch.cat([tokens_BWP, made[-1]], dim=2)
        return torch.cat(made, dim=2)
