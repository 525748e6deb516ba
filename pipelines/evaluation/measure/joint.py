"""The joint distribution of the next k tokens after held-out contexts, against the AR model's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kforcing.backbone import head, load_ar
from kforcing.baselines.base import Decoder
from kforcing.coupling import COUPLINGS
from kforcing.device import pick_device
from kforcing.distillation.teachers import ARTeacher
from kforcing.keys import derive_key
from kforcing.metrics.joint import (
    ar_score,
    divergence,
    enumerable,
    independent,
    joint_tv,
    position_entropy,
    sample_blocks,
    student_score,
)
from kforcing.modeling import PushForwardLM
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import heldout

BLOCK = 4
"""Tokens of the joint distribution by which all rows are compared."""
ROWS_AT_ONCE = 512
FIRST_CONTEXT = 1000
"""Row of the held-out store from which contexts are taken."""


def next_blocks(measurement: Measurement, decoder: Decoder, stream: str) -> Tensor:
    """(contexts, samples, BLOCK) int64 tokens that a decoder makes after fixed prompts, each block from its own noise.

    Args:
        stream: part of the noise's key; decoders that are given the same stream read the same noise.
    """
    config = measurement.config
    contexts, samples = config.fidelity.contexts, config.fidelity.samples
    prompts = heldout(measurement, contexts, config.text.prompt_tokens, FIRST_CONTEXT)
    blocks = []
    for c, context_N in enumerate(prompts.tokens_RN):
        seeds = [derive_key(config.seed, "blocks", stream, c, i) % 2**31 for i in range(samples)]
        for some in [seeds[i : i + ROWS_AT_ONCE] for i in range(0, len(seeds), ROWS_AT_ONCE)]:
            blocks.append(decoder.decode(context_N.expand(len(some), -1), BLOCK, some).tokens_RT.cpu())
    return torch.cat(blocks).view(len(prompts.seeds), samples, BLOCK)


def joint_of(
    measurement: Measurement, blocks_CSK: Tensor, reference_CSK: np.ndarray, floor_C: list[float] | None = None
) -> dict[str, Any]:
    """Total variation to the AR model's blocks in hashed buckets, and the entropy of the offsets' marginals.

    Args:
        blocks_CSK: S blocks after each of C contexts.
        reference_CSK: the AR model's.
        floor_C: total variation of another sample of the AR model after the same contexts. With it, `excess` is how much
            larger the total variation is.
    """
    tv, entropy = [], []
    for mine, theirs in zip(blocks_CSK, torch.from_numpy(reference_CSK), strict=True):
        tv.append(joint_tv(mine, theirs, measurement.config.fidelity.buckets))
        entropy.append(position_entropy(mine))
    values = {"tv": tv, "entropy": entropy}
    if floor_C is not None:
        values["excess"] = np.subtract(tv, floor_C).tolist()
    docs = heldout(measurement, len(tv), 1, FIRST_CONTEXT).doc_R
    figures = measurement.over_documents(np.array([*values.values()]).T, np.ones(len(tv)), docs)
    return {**dict(zip(values, figures, strict=True)), "by_context": tv, "documents": len(set(docs))}


def joint_of_student(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """Divergence between a student's next k tokens and the AR model's, after whole held-out blocks.

    It is exact where all blocks of k tokens can be enumerated, estimated from densities where the student has them, and
    otherwise the total variation of samples in hashed buckets; `by` says which of the three.
    """
    assert measurement.student is not None
    config, fidelity, k, device = measurement.config, measurement.config.fidelity, measurement.k, pick_device()
    teacher = load_ar(measurement.subject.teacher).to(device)
    model = PushForwardLM.from_pretrained(measurement.student.path).to(device)
    contexts = heldout(measurement, fidelity.contexts, measurement.subject.run.corpus.data.block, FIRST_CONTEXT)
    conditional, vocabulary = model.config.design.conditional, head(teacher).weight.shape[0]
    by = "samples" if not conditional else "enumeration" if enumerable(vocabulary, k) else "densities"
    roll_out = ARTeacher(teacher, COUPLINGS["inverse_cdf"]).rollout

    def drawn(c: int, name: str, draw: Any = roll_out) -> Tensor:
        return sample_blocks(draw, contexts.tokens_RN[c], k, fidelity.samples, derive_key(config.seed, name, c))

    def from_densities(c: int) -> dict[str, float]:
        blocks = None if by == "enumeration" else drawn(c, "one")
        context_N = contexts.tokens_RN[c]
        return asdict(divergence(ar_score(teacher), student_score(model), context_N, k, vocabulary, blocks))

    def from_samples(c: int) -> dict[str, float]:
        with torch.inference_mode():
            mine = drawn(c, "student", lambda w: model.draw(w).tokens_BWK)
        one, two, buckets = drawn(c, "one"), drawn(c, "two"), _buckets(k, fidelity.buckets)
        lines = {"tv": mine, "floor_tv": two, "independent_tv": independent(two, 0)}
        return {name: joint_tv(blocks, one, buckets) for name, blocks in lines.items()}

    by_context = [from_densities(c) if conditional else from_samples(c) for c in range(len(contexts.seeds))]
    sums = np.array([list(figures.values()) for figures in by_context])
    figures = measurement.over_documents(sums, np.ones(len(sums)), contexts.doc_R)
    return {"k": k, "by": by, "samples": fidelity.samples, **dict(zip(by_context[0], figures, strict=True))}


def _buckets(k: int, at_four: int) -> int:
    """Buckets of a token that give about as many cells for blocks of k tokens as for blocks of four."""
    return max(2, round(at_four ** (4 / k)))
