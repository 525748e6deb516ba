"""Drafts that are accepted at a chosen rate, for students that were never trained.

The AR model, else random, counts: behind token t it draws t + 1, whatever the temperature, the noise and the dtype. So the
right draft at every place is known, and a read-out can make it with any probability. The student's own drafts are computed
all the same, and only their tokens are replaced, so that a step costs what it costs with a trained student.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kforcing import Design, PushForwardLM, SequentialConfig
from kforcing.attention.reader import Reader
from kforcing.attention.windows import Windows
from kforcing.backbone import embeddings, head
from kforcing.readout.base import Pick, Turn
from kforcing.readout.sequential import SequentialReadout

SHARPNESS = 100.0
"""The logit of the token that follows. Those of the others lie around 0."""


@torch.no_grad()
def make_counting(backbone: Any) -> None:
    """Change embeddings and LM head of a random Llama so that the token after t is t + 1, modulo the vocabulary.

    Embeddings grow until they outweigh what the layers add to them, and row t + 1 of the head becomes the direction of
    embedding t. The head is a matrix of its own afterwards, of the same size.
    """
    width = embeddings(backbone).weight.shape[1]
    directions_VD = nn.functional.normalize(embeddings(backbone).weight, dim=-1)
    backbone.config.tie_word_embeddings = False
    embeddings(backbone).weight = nn.Parameter(10 * width**0.5 * directions_VD)
    backbone.get_output_embeddings().weight = nn.Parameter(SHARPNESS / width**0.5 * directions_VD.roll(1, dims=0))


class SimulatedDrafts(SequentialReadout):
    """The sequential read-out of a model that counts; each draft is right with probability `acceptance`."""

    acceptance: float

    def drafts(
        self,
        backbone: PreTrainedModel,
        windows: Windows,
        reader: Reader,
        trunk_BWD: Tensor,
        first_BW: Tensor,
        pick: Pick | None,
    ) -> Iterator[Turn]:
        """See `SequentialReadout.drafts`. Low bits of a position's noise decide whether its draft is right."""
        vocabulary = head(backbone).weight.shape[0]
        turns = super().drafts(backbone, windows, reader, trunk_BWD, first_BW, pick)
        for offset, (logits_BWV, _) in enumerate(turns, start=1):
            coin_BW = (windows.noise_BWK[..., offset] * 2**20).frac()
            wrong_BW = (coin_BW >= self.acceptance).long()
            yield logits_BWV, (first_BW + offset + wrong_BW) % vocabulary


def simulated_student(
    backbone: PreTrainedModel, k: int, parts: SequentialConfig, coupling: str, acceptance: float
) -> PushForwardLM:
    """An untrained student of a model that counts. Raises ValueError for an acceptance that is no probability."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance} of a draft must be a probability, from 0 to 1")
    student = PushForwardLM.from_backbone(backbone, k, Design("sequential", coupling, sequential=parts))
    readout: Any = student.readout
    readout.__class__, readout.acceptance = SimulatedDrafts, acceptance
    return student
