"""The ways to decode that an evaluation compares: each is one row of its table."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kforcing.baselines.base import Decoded
from kforcing.device import pick_device
from kforcing.engine import Engine, EngineConfig, Request, SamplingParams


@dataclass(frozen=True)
class MethodRow:
    """One way to decode: a trained method at some number of tokens a step, the AR model, or a student of the run.

    Finished parts of an evaluation are named by these fields, so a renamed field makes all of them run again.
    """

    name: str
    k: int
    """Tokens a step. For decoders that verify their guesses, the number of guesses in a pass."""
    decoder: str
    """Which decoder runs: `ar`, `transformers`, `engine` (for students), or a name in the `decoders` of its method."""
    method: str | None = None
    """Key of the method in METHODS; none for the AR model and for the run's own students."""
    path: str = ""
    """Folder of the student, when the run trained it."""
    coupling: str = "inverse_cdf"
    """The function that turns noise into tokens, here and in the AR model that the row is compared with."""
    same_noise: bool = True
    """Whether the decoder reads the same noise as the AR model, so that texts can be compared token by token."""
    exact: bool = False
    """Whether the engine verifies a student's tokens, so that the text should be the AR model's."""
    adapt_width: bool = False
    """Whether the engine chooses in each step how many tokens, up to k, it drafts."""


def slug(name: str) -> str:
    """The name of a row as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rows_in(root: Path) -> list[MethodRow]:
    """The rows of an evaluation, in the order of its table."""
    return [MethodRow(**record) for record in json.loads((root / "rows.json").read_text())]


class EngineDecoder:
    """The decode engine with the interface of the baselines' decoders."""

    def __init__(
        self,
        model: Any,
        k: int,
        coupling: str,
        temperature: float = 1.0,
        exact: bool = False,
        adapt_width: bool = False,
    ):
        self.model, self.k, self.coupling, self.temperature = model, k, coupling, temperature
        self.acceptance, self.adapt_width = "exact" if exact else "fixed", adapt_width
        self._engine: Engine | None = None

    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """Continue prompts; arguments and result are those of `kforcing.baselines.base.Decoder.decode`."""
        R, N = prompts_RN.shape
        engine = self._engine_for(R, N, new_tokens)
        sampling = SamplingParams(temperature=self.temperature)
        requests = [
            Request(p, new_tokens, seed=s, sampling=sampling) for p, s in zip(prompts_RN.tolist(), seeds, strict=True)
        ]
        done = engine.generate(requests)
        passes = sum(c.steps for c in done) / (new_tokens * R)
        return Decoded(torch.tensor([c.tokens for c in done]), passes)

    def _engine_for(self, rows: int, prompt: int, new_tokens: int) -> Engine:
        """An engine for these sizes. It is kept while the sizes stay the same."""
        held, length = self._engine, prompt + new_tokens
        if held is not None and (held.config.max_num_seqs, held.max_model_len) == (rows, length):
            return held
        # On a GPU the engine runs a group of steps between two looks at the tokens. A group must end where a text ends.
        group = math.gcd(8, -(-new_tokens // self.k)) if pick_device().type == "cuda" else 1
        config = EngineConfig(
            max_num_seqs=rows,
            max_model_len=length,
            k=self.k,
            max_num_batched_tokens=rows * prompt,
            check_every=group,
            coupling=self.coupling,
            acceptance=self.acceptance,
            adapt_width=self.adapt_width,
        )
        self._engine = Engine(self.model, config)
        return self._engine
