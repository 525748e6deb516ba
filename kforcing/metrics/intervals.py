"""95% intervals of means and ratios, bootstrapped over clusters such as documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95% interval, which are None when there is only one cluster."""

    value: float
    lo: float | None
    hi: float | None


def over_clusters(
    sums_RM: np.ndarray, counts_R: np.ndarray, cluster_R: Sequence[Any] | np.ndarray, draws: int, seed: int
) -> list[Interval] | None:
    """Σ sums / Σ counts of M figures over R items, bootstrapped over the clusters of the items; None when all counts are 0.

    Args:
        sums_RM: sum of each figure over each item.
        counts_R: what the sums are divided by.
        cluster_R: the cluster of each item, for example the name of its document. Clusters whose counts are 0 are left out,
            because a resample of such clusters alone would have no mean.
        draws: resamples.
        seed: of the resampling.
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

    The bootstrap is studentised (bootstrap-t, Efron and Tibshirani 1993, §12.5): it takes quantiles of (mean − value) /
    standard error. Such intervals have their nominal coverage with as few as ten clusters, where percentiles of the
    mean are too short. An interval is cut at the smallest and the largest mean of a cluster, which bound every mean of
    clusters. Two or three clusters have these bounds as their interval; one cluster has no interval.

    Args:
        sums_CM: sum of each figure over the windows of each cluster.
        counts_C: number of windows of each cluster.
        draws: resamples, each of C clusters drawn with replacement.
        seed: of the resampling.
    """
    C = len(counts_C)
    if C == 1:
        return [Interval(float(v), None, None) for v in sums_CM[0] / counts_C[0]]
    rng = np.random.default_rng(seed)
    times_SC = np.stack([np.bincount(rng.integers(0, C, C), minlength=C) for _ in range(draws)]).astype(float)
    value_M, error_M = _ratio(np.ones((1, C)), sums_CM, counts_C)
    mean_SM, spread_SM = _ratio(times_SC, sums_CM, counts_C)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A resample with standard error 0 is infinitely many errors away, or 0 if its mean is the value.
        t_SM = np.nan_to_num((mean_SM - value_M) / spread_SM, nan=0.0, posinf=1e300, neginf=-1e300)
        own_CM = sums_CM / counts_C[:, None]
    low_M, high_M = np.quantile(t_SM, [0.025, 0.975], axis=0, method="nearest")
    lo = np.maximum(value_M - high_M * error_M, np.nanmin(own_CM, axis=0))[0]
    hi = np.minimum(value_M - low_M * error_M, np.nanmax(own_CM, axis=0))[0]
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(value_M[0], lo, hi, strict=True)]


def _ratio(times_SC: np.ndarray, sums_CM: np.ndarray, counts_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ sums / Σ counts with clusters weighted by `times_SC`, and its linearised standard error: both (S, M)."""
    C, total = len(counts_C), (times_SC @ counts_C)[:, None]
    mean = times_SC @ sums_CM / total
    squares = times_SC @ sums_CM**2 - 2 * mean * (times_SC @ (sums_CM * counts_C[:, None]))
    squares += mean**2 * (times_SC @ counts_C**2)[:, None]
    # Set to 0 what differs from 0 by rounding alone.
    squares[squares < 1e-12 * np.maximum(times_SC @ sums_CM**2, 1e-300)] = 0.0
    return mean, np.sqrt(squares * C / max(C - 1, 1)) / total
