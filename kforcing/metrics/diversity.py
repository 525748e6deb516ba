"""Diversity of texts.

    distinct_n        distinct n-grams over all n-grams of a corpus (Li et al. 2016, arXiv 1510.03055)
    repetition        share of tokens inside an n-gram that began earlier in the same document
    unigram_entropy   entropy of a document's own token counts, in nats; the figure is the mean over documents

All three depend on the amount of text, so compare documents of equal length and number. Shapes: C documents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kforcing.metrics.intervals import Interval, over_clusters

Clusters = Sequence[Any] | np.ndarray | None
"""The cluster of each document, for intervals; none when every document is its own cluster."""


@dataclass(frozen=True)
class Diversity:
    """How varied the documents of one corpus are. Arrays hold one number for each document, (C,) float64."""

    tokens_C: np.ndarray
    repeated_C: np.ndarray
    """Tokens inside an n-gram that began earlier in the document."""
    entropy_C: np.ndarray
    """Nats. It is 0 for an empty document, which the mean leaves out."""
    distinct: dict[int, float]
    """Share of distinct n-grams by n, over the whole corpus. It is no mean over documents and has no interval."""

    def intervals(self, draws: int, seed: int, cluster_C: Clusters = None) -> dict[str, Interval | None]:
        """Repetition (over tokens), entropy (over documents with tokens) and length; None where all counts are 0.

        Args:
            draws: resamples of the bootstrap.
            seed: of the bootstrap.
            cluster_C: what is resampled, such as the text that each document's prompt comes from; none for documents.
        """
        figures = {
            "repetition": (self.repeated_C, self.tokens_C),
            "entropy": (self.entropy_C, (self.tokens_C > 0).astype(float)),
            "length": (self.tokens_C, np.ones_like(self.tokens_C)),
        }
        return {name: interval_over(sums, counts, cluster_C, draws, seed) for name, (sums, counts) in figures.items()}


def interval_over(
    sums_C: np.ndarray, counts_C: np.ndarray, cluster_C: Clusters, draws: int, seed: int
) -> Interval | None:
    """Σ sums / Σ counts of C documents with its interval over clusters; None where all counts are 0."""
    clusters = np.arange(len(counts_C)) if cluster_C is None else cluster_C
    found = over_clusters(sums_C[:, None], counts_C, clusters, draws, seed)
    return found[0] if found else None


def diversity(documents: Sequence[Sequence[int]], orders: Sequence[int] = (1, 2, 3), n: int = 4) -> Diversity:
    """All figures of a corpus, given as token ids of one tokenizer.

    Args:
        orders: the n of distinct-n.
        n: length of the n-grams of `repetition`.
    """
    return Diversity(
        np.array([len(d) for d in documents], float),
        np.array([repeated_tokens(d, n) for d in documents], float),
        np.array([unigram_entropy(d) for d in documents], float),
        {order: distinct_n(documents, order) for order in orders},
    )


def distinct_n(documents: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of a corpus, none of which crosses documents. NaN when there is no n-gram."""
    counts = Counter(gram for document in documents for gram in _ngrams(document, n))
    return len(counts) / counts.total() if counts else math.nan


def repeated_tokens(tokens: Sequence[int], n: int = 4) -> int:
    """Number of tokens inside an n-gram that also began earlier in the document; the two occurrences may overlap."""
    seen: set[tuple[int, ...]] = set()
    covered = repeated = 0  # tokens before `covered` are counted already
    for start, gram in enumerate(_ngrams(tokens, n)):
        if gram in seen:
            repeated += start + n - max(start, covered)
            covered = start + n
        seen.add(gram)
    return repeated


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of a document's own token counts in nats, at most the log of its length; 0 for an empty document."""
    counts = np.array(list(Counter(tokens).values()), float)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum()) + 0.0


def _ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)
