"""The design of a student: plain settings that its `config.json` keeps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NoiseConfig:
    """How a hint's noise enters the network."""

    min_cycles: float = 1e-4
    """Lowest frequency of the sinusoids of z, in cycles over [0, 1)."""
    max_cycles: float = 1.0
    """Highest frequency of the sinusoids of z, in cycles over [0, 1). The paper's release stops at 1."""
    temperature_min: float = 1.0
    """Lowest temperature rollouts are sampled at, and an argmax student is trained for."""
    temperature_max: float = 1.0
    """Highest such temperature; equal to the lowest for a student of one temperature."""

    def check(self) -> None:
        """Raise ValueError unless both ranges are positive and in order."""
        if not 0 < self.min_cycles < self.max_cycles < math.inf:
            raise ValueError(f"noise cycles must satisfy 0 < min < max, got {self.min_cycles} and {self.max_cycles}")
        if not 0 < self.temperature_min <= self.temperature_max < math.inf:
            raise ValueError(
                f"temperatures must satisfy 0 < min ≤ max, got {self.temperature_min} and {self.temperature_max}"
            )

    def clamp(self, temperature: float) -> float:
        """The temperature nearest to the given one that the student is trained for."""
        return min(max(temperature, self.temperature_min), self.temperature_max)


@dataclass(frozen=True)
class SequentialConfig:
    """Parts and sizes of the sequential read-out."""

    hints: str = "copy"
    """Layers that hints go through: `none` (no hints), `copy` (copies of the trunk's last layers, trained) or `adapter`
    (the trunk's own last layers, with trained low-rank additions and norms of their own that only hints see)."""
    hint_layers: int = 0
    """How many of the last layers; 0 for all."""
    adapter_rank: int = 16
    """Rank of the additions of `adapter`."""
    draft: str = "first"
    """What hint j sees of token j: `first` (hint 1 carries the token the trunk has just made), `none`, or `bigram`
    (later hints carry a guess by a bigram model under the same noise, too)."""
    shortlist: int = 0
    """Score hint states against the vocabulary in parallel and let the head re-score only this many best tokens of
    each; 0 scores the whole vocabulary after each token."""
    draft_rank: int = 0
    """Choose the shortlist by a copy of the LM head of this rank, applied to the head's own states and with the noise of the
    draw, instead of by the hints' logits. Needs `coupling=gumbel` and a shortlist; 0 for none."""
    side_weight: float = 0.3
    """Weight of the loss on logits that only choose candidates (of hints for a shortlist, of the bigram draft)."""
    freeze_trunk: bool = True
    """Leave the AR model as it is, so that it stays in the checkpoint and token 1 stays exact."""

    def check(self) -> None:
        """Raise ValueError for an unknown choice or a size that cannot be."""
        if self.hints not in ("none", "copy", "adapter"):
            raise ValueError(f"hints={self.hints}: choose one of none, copy, adapter")
        if self.draft not in ("none", "first", "bigram"):
            raise ValueError(f"draft={self.draft}: choose one of none, first, bigram")
        if min(self.hint_layers, self.shortlist) < 0 or not 0 <= self.side_weight < math.inf or self.adapter_rank < 1:
            raise ValueError(
                f"hint_layers={self.hint_layers}, shortlist={self.shortlist} and side_weight={self.side_weight} must be at "
                f"least 0, adapter_rank={self.adapter_rank} at least 1"
            )
        if self.draft_rank < 0 or (self.draft_rank and not self.shortlist):
            raise ValueError(
                f"draft_rank={self.draft_rank} chooses the tokens of a shortlist, and shortlist={self.shortlist}: set a "
                "shortlist, for example 64, or draft_rank=0"
            )
        if self.hints == "none" and (self.draft != "none" or (self.shortlist and not self.draft_rank)):
            raise ValueError(
                f"hints=none has nothing to show draft={self.draft} to or to choose a shortlist of {self.shortlist} from; "
                "set draft=none and shortlist=0, or hints=copy"
            )


@dataclass(frozen=True)
class Design:
    """How a student turns noise into tokens: what distinguishes one recipe's student from another's."""

    readout: str = "argmax"
    """`argmax` (the paper's: hints carry the noise) or `sequential` (exact trunk, parallel hints, a small head)."""
    coupling: str = "inverse_cdf"
    """How noise picks a token from a distribution, the teacher's and a sequential student's: `inverse_cdf` in
    vocabulary order (the paper's), or `gumbel`. An argmax student has to learn it, which only the former allows."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Noise encoder of an argmax student, and temperatures."""
    sequential: SequentialConfig = field(default_factory=SequentialConfig)
    """Parts of a sequential student."""

    def check(self) -> None:
        """Raise ValueError for an unknown choice or parts that do not go together."""
        from kforcing.coupling import COUPLINGS  # needs torch, which a process that only reads a design may not have

        for name, value, choices in (
            ("readout", self.readout, ("argmax", "sequential")),
            ("coupling", self.coupling, tuple(COUPLINGS)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")
        if self.readout == "argmax" and self.coupling != "inverse_cdf":
            raise ValueError(
                f"readout=argmax with coupling={self.coupling}: the network would have to undo a random generator; "
                "use coupling=inverse_cdf, or readout=sequential"
            )
        if self.conditional and self.sequential.draft_rank and self.coupling != "gumbel":
            raise ValueError(
                f"draft_rank={self.sequential.draft_rank} chooses candidates by their Gumbel noise, which coupling="
                f"{self.coupling} does not have; use coupling=gumbel, or draft_rank=0"
            )
        self.noise.check()
        self.sequential.check()

    @property
    def conditional(self) -> bool:
        """Whether the student's logits are distributions given the tokens before, and not functions of the noise."""
        return self.readout == "sequential"

    @property
    def exact_trunk(self) -> bool:
        """Whether the AR model stays inside the student unchanged."""
        return self.conditional and self.sequential.freeze_trunk

    def effective(self) -> Design:
        """The same design with the parts that its read-out does not have at their defaults."""
        if not self.conditional:
            return dataclasses.replace(self, sequential=SequentialConfig())
        low, high = self.noise.temperature_min, self.noise.temperature_max
        return dataclasses.replace(self, noise=NoiseConfig(temperature_min=low, temperature_max=high))

    def learns(self, k: int) -> bool:
        """Whether a student of this k has anything to learn: a sequential one's first token is the AR model's."""
        return not self.conditional or k > 1
