"""What a part of an evaluation is about, and what all parts need: the decoder of a row, intervals, texts cut at EOS."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kforcing.baselines.base import Decoder
from kforcing.loading import load_tokenizer
from kforcing.metrics.intervals import over_clusters
from pipelines.data.encoding import eos_id
from pipelines.evaluation.baseline_training import noise_of
from pipelines.evaluation.baselines import decoder_of
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.decoders import MethodRow
from pipelines.evaluation.subject import Student, Subject

Figure = dict[str, Any]
"""`value`, and the ends `lo` and `hi` of its 95% interval, which are None where there is one document only."""


@dataclass(frozen=True)
class Measurement:
    """The models and settings of an evaluation, and which of the models a part measures."""

    subject: Subject
    config: EvaluationConfig
    row: MethodRow | None = None
    """For a part about one row."""
    student: Student | None = None
    """For a part about one student of the run."""
    k: int = 0
    """Tokens a step of that student."""
    rows: tuple[str, ...] = ()
    """Names of rows, for a part about several."""

    @property
    def root(self) -> Path:
        """Folder of the evaluation."""
        return Path(self.subject.root)

    def decoder(self, row: MethodRow, temperature: float = 1.0) -> Decoder:
        """The decoder of a row, loaded from the folder in which its method was trained."""
        trained = self.root / f"train-{row.method}" if row.method else None
        noise = noise_of(self.subject.run.shared.design)
        return decoder_of(row, self.subject.teacher, trained, self.subject.last.k, noise, temperature)

    def cut(self, tokens_RT: Tensor) -> list[list[int]]:
        """Texts up to their first EOS when `text.cut_at_eos` is set, else whole texts."""
        rows = tokens_RT.tolist()
        if not self.config.text.cut_at_eos:
            return rows
        eos = eos_id(load_tokenizer(self.subject.tokenizer))
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    def over_documents(self, sums_RM: np.ndarray, counts_R: np.ndarray, doc_R: np.ndarray) -> list[Figure | None]:
        """Means of M figures over R texts, Σ sums / Σ counts, with intervals over the documents of the texts.

        A figure is None when all counts are 0.
        """
        found = over_clusters(sums_RM, counts_R, doc_R, self.config.bootstrap, self.config.seed)
        return [asdict(i) for i in found] if found else [None] * sums_RM.shape[1]
