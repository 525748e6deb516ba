"""Fidelity of a student to its AR teacher under the same noise, with honest intervals.

match_j       share of windows whose j-th student token equals the AR teacher's coupled token
block_match   share of windows with all k equal
student_nll   the AR teacher's −log p of the student's tokens; teacher_nll: of the teacher's own. Two-sided: a student
              that is *likelier* under the teacher than the teacher itself has collapsed towards modes
target_nll    −log p_j of the teacher's coupled token under the student: the training loss on held-out data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kforcing.coupling import COUPLINGS
from kforcing.losses import token_nll
from kforcing.model import PushForwardLM
from kforcing.rollout import ARTeacher
from kforcing.staircase import Windows, ar_block_states, head, read_context


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
    scores = student.scores(windows, theirs)

    def teacher_nll(tokens_BWK: Tensor) -> Tensor:
        return token_nll(head(teacher), ar_block_states(teacher, context, windows.anchors_BW, tokens_BWK), tokens_BWK)

    return WindowScores(
        match=mine == theirs,
        student_nll=teacher_nll(mine),
        teacher_nll=teacher_nll(theirs),
        target_nll=token_nll(scores.head, scores.states_BWKD, theirs),
    )


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval, which is None where one cluster is all there is."""

    value: float
    lo: float | None
    hi: float | None


def over_clusters(
    sums_RM: np.ndarray, counts_R: np.ndarray, cluster_R: Sequence[Any] | np.ndarray, draws: int, seed: int
) -> list[Interval] | None:
    """Σ sums / Σ counts of M figures over R items, bootstrapped over what they belong to; None when nothing counts.

    Args:
        cluster_R: any names, such as the document of each item. Clusters that count nothing are left out, lest a resample
            hold no other.
    """
    keep = counts_R > 0
    if not keep.any():
        return None
    names, cluster = np.unique(np.asarray(cluster_R)[keep], return_inverse=True)
    sums_CM = np.zeros((len(names), sums_RM.shape[1]))
    np.add.at(sums_CM, cluster, sums_RM[keep])
    return cluster_bootstrap(sums_CM, np.bincount(cluster, counts_R[keep]), draws, seed)


def cluster_bootstrap(sums_CM: np.ndarray, counts_C: np.ndarray, draws: int, seed: int) -> list[Interval]:
    """Means of M figures with 95% intervals, bootstrapped over clusters (documents, not tokens).

    Studentised (bootstrap-t, Efron and Tibshirani 1993, §12.5): what is resampled is (mean − value) / standard error, which
    covers what it says with as few as ten clusters, where percentiles of the mean are too short. Ends are cut to
    the smallest and largest mean of a cluster, which no mean of theirs can leave; two or three clusters have these ends,
    and one has no interval.

    Args:
        sums_CM: sum of each figure over the windows of each cluster.
        counts_C: windows of each cluster.
        draws: resamples; each draws as many clusters as there are, with replacement.
    """
    C = len(counts_C)
    if C == 1:
        return [Interval(float(v), None, None) for v in sums_CM[0] / counts_C[0]]
    rng = np.random.default_rng(seed)
    times_SC = np.stack([np.bincount(rng.integers(0, C, C), minlength=C) for _ in range(draws)]).astype(float)
    value_M, error_M = _ratio(np.ones((1, C)), sums_CM, counts_C)
    mean_SM, spread_SM = _ratio(times_SC, sums_CM, counts_C)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A resample without spread lies infinitely many errors away, unless it lies nowhere else.
        t_SM = np.nan_to_num((mean_SM - value_M) / spread_SM, nan=0.0, posinf=1e300, neginf=-1e300)
        own_CM = sums_CM / counts_C[:, None]
    low_M, high_M = np.quantile(t_SM, [0.025, 0.975], axis=0, method="nearest")
    lo = np.maximum(value_M - high_M * error_M, np.nanmin(own_CM, axis=0))[0]
    hi = np.minimum(value_M - low_M * error_M, np.nanmax(own_CM, axis=0))[0]
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(value_M[0], lo, hi, strict=True)]


def _ratio(times_SC: np.ndarray, sums_CM: np.ndarray, counts_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ sums / Σ counts over clusters taken so many times, and its standard error (linearised): both (S, M)."""
    C, total = len(counts_C), (times_SC @ counts_C)[:, None]
    mean = times_SC @ sums_CM / total
    squares = times_SC @ sums_CM**2 - 2 * mean * (times_SC @ (sums_CM * counts_C[:, None]))
    squares += mean**2 * (times_SC @ counts_C**2)[:, None]
    # Rounding leaves what is nothing a little above or below it.
    squares[squares < 1e-12 * np.maximum(times_SC @ sums_CM**2, 1e-300)] = 0.0
    return mean, np.sqrt(squares * C / max(C - 1, 1)) / total
