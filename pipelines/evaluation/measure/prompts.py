"""Held-out prompts that decoders continue."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kforcing.device import pick_device
from kforcing.keys import derive_key
from pipelines.data.rows import documents_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.evaluation.measure.measurement import Measurement

ROWS_A_PROMPT = 8
"""Rows of the held-out store that are read for each prompt, so that prompts can come from different documents."""


@dataclass(frozen=True)
class Prompts:
    """Beginnings of held-out blocks."""

    tokens_RN: Tensor
    """int64, on the device of this process."""
    doc_R: np.ndarray
    """The document of each prompt. Intervals are bootstrapped over documents."""
    seeds: list[int]
    """Seed of the noise after each prompt."""


def heldout(measurement: Measurement, count: int, tokens: int, first: int = 0) -> Prompts:
    """Prompts of some length from `ROWS_A_PROMPT · count` rows of the held-out store, and a noise seed for each.

    Each prompt comes from another document as long as these rows hold enough documents.

    Args:
        count: number of prompts.
        tokens: tokens of each.
        first: the first row that is read, so that parts can have prompts of their own.
    """
    subject, seed = measurement.subject, measurement.config.seed
    store = TokenStore(subject.heldout, seed)
    rows = store.read(np.arange(first, first + ROWS_A_PROMPT * count) % store.rows_per_epoch)
    seen: Counter[int] = Counter()
    numbers = []  # of each row within its document
    for doc in documents_of(rows).tolist():
        numbers.append(seen[doc])
        seen[doc] += 1
    rows = rows.take(np.argsort(numbers, kind="stable")[:count])
    ids = tokens_of(rows)[:, :tokens]
    seeds = [derive_key(seed, "prompt", first + i) % 2**31 for i in range(count)]
    return Prompts(ids.to(pick_device()), documents_of(rows), seeds)
