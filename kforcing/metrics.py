"""Fidelity of a student to its AR teacher under the same noise, with honest intervals.

match_j       share of windows whose j-th student token equals the AR teacher's coupled token
block_match   share of windows with all k equal
student_nll   the AR teacher's −log p of the student's tokens; teacher_nll: of the teacher's own. Two-sided: a student
              that is *likelier* under the teacher than the teacher itself has collapsed towards modes
target_nll    −log p_j of the teacher's coupled token under the student: the training loss on held-out data
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import COUPLINGS
from kforcing.model import PushForwardLM
from kforcing.rollout import ARTeacher
from kforcing.staircase import Windows, ar_block_logits, read_context


@dataclass(frozen=True)
class WindowScores:
    """Per window and offset, all (B, W, K)."""

    match: Tensor
    student_nll: Tensor
    teacher_nll: Tensor
    target_nll: Tensor


@torch.inference_mode()
def window_scores(student: PushForwardLM, teacher: PreTrainedModel, windows: Windows) -> WindowScores:
    """Run student and AR teacher on the same windows and noise, under the student's coupling.

    Args:
        student: of k ≥ windows.k.
        teacher: the AR model.
    """
    mine = student.draw(windows).tokens_BWK
    theirs = ARTeacher(teacher, COUPLINGS[student.config.design.coupling]).rollout(windows)
    context = read_context(teacher, windows.context_BN)
    return WindowScores(
        match=mine == theirs,
        student_nll=_nll(ar_block_logits(teacher, context, windows.anchors_BW, mine), mine),
        teacher_nll=_nll(ar_block_logits(teacher, context, windows.anchors_BW, theirs), theirs),
        target_nll=_nll(student.scores(windows, theirs).logits_BWKV.float(), theirs),
    )


def _nll(logits_BWKV: Tensor, tokens_BWK: Tensor) -> Tensor:
    return -logits_BWKV.log_softmax(dim=-1).gather(-1, tokens_BWK[..., None]).squeeze(-1)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    lo: float
    hi: float


def cluster_bootstrap(sums_CM: np.ndarray, counts_C: np.ndarray, draws: int, seed: int) -> list[Interval]:
    """Means of M figures with 95% bootstrap intervals over clusters (documents, not tokens).

    Percentile intervals of few clusters are too short: the resamples' spread is that of C clusters divided by C, not by
    C − 1, and normal where it should be Student's. The percentiles are therefore moved out to
    Φ(∓ t(C − 1) · √(C / (C − 1))) (Hesterberg 2015, *What Teachers Should Know About the Bootstrap*, §3.4).

    Args:
        sums_CM: sum of each figure over the windows of each cluster.
        counts_C: windows of each cluster.
        draws: resamples; each draws as many clusters as there are, with replacement.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(counts_C), (draws, len(counts_C)))
    means = sums_CM[picks].sum(1) / counts_C[picks].sum(1)[:, None]
    low, high = np.quantile(means, _levels(len(counts_C)), axis=0)
    value = sums_CM.sum(0) / counts_C.sum()
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]


def _levels(clusters: int) -> tuple[float, float]:
    from scipy.stats import norm, t

    if clusters < 2:
        return 0.0, 1.0
    outer = float(norm.cdf(t.ppf(0.025, clusters - 1) * (clusters / (clusters - 1)) ** 0.5))
    return outer, 1 - outer
