"""The ways of decoding that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kforcing import PushForwardLM, SequentialConfig
from kforcing.backbone import random_llama
from kforcing.readout.base import Student, as_student
from pipelines.benchmarks.decoding.simulation import make_counting, simulated_student

AR = "engine, AR"
PARTS = {
    "gumbel": SequentialConfig(hint_layers=1, shortlist=64, draft_rank=128),
    "inverse_cdf": SequentialConfig(hint_layers=1, shortlist=64),
}
"""By coupling: the student with random weights has one hint layer and a shortlist."""


@dataclass(frozen=True)
class DecodingWay:
    """A model in the engine, and how it decodes."""

    name: str
    model: Any
    k: int = 1
    """Tokens of a block at most."""
    exact: bool = False
    """Exact mode; otherwise fixed."""
    adapt_width: bool = False
    """Exact mode: the engine chooses the width of each step, up to k. Otherwise every block has k tokens."""
    coupling: str = "gumbel"
    """Of an AR model: that of the student it is compared with."""
    row_kernel: bool | None = None
    quantization: str | None = None
    batch_invariant: bool = False

    @property
    def student(self) -> Student | None:
        """The model, if it is a student."""
        return as_student(self.model)

    def knows(self, temperature: float) -> bool:
        """Whether it can decode at this temperature: an argmax student only at those of its training."""
        design = self.student.design if self.student else None
        return design is None or design.conditional or design.noise.clamp(temperature) == temperature


def untrained_backbone(device: torch.device, dtype: torch.dtype) -> Any:
    """`random_llama`, made to count."""
    backbone = random_llama()
    make_counting(backbone)
    return backbone.to(device=device, dtype=dtype)


def untrained_ways(backbone: Any, ks: list[int], coupling: str, acceptance: float, more: bool) -> list[DecodingWay]:
    """AR, fixed and exact mode of an untrained student whose drafts are accepted at a simulated rate.

    `more` adds the paper's read-out, a student without a shortlist, the stock kernels of CPUs and the batch-invariant mode.
    """
    most = max(ks)
    student = simulated_student(backbone, most, PARTS[coupling], coupling, acceptance)
    ways = [DecodingWay(AR, backbone, coupling=coupling), *student_ways(student, ks)]
    if not more:
        return ways
    whole = simulated_student(backbone, most, SequentialConfig(hint_layers=1), coupling, acceptance)
    paper = PushForwardLM.from_backbone(backbone, most)
    return [
        *ways,
        DecodingWay(f"engine, fixed k={most}, no shortlist", whole, most),
        DecodingWay(f"engine, exact k={most}, no shortlist", whole, most, exact=True),
        context_way(backbone, most, coupling),
        DecodingWay("engine, AR, inverse CDF", backbone, coupling="inverse_cdf"),
        DecodingWay(f"engine, paper's read-out k={most}", paper, most),
        *(
            [DecodingWay("stock kernels, AR", backbone, coupling=coupling, row_kernel=False)]
            if _on_cpu(backbone)
            else []
        ),
        DecodingWay("batch-invariant, AR", backbone, coupling=coupling, batch_invariant=True),
    ]


def student_ways(student: PushForwardLM, ks: list[int]) -> list[DecodingWay]:
    """Fixed mode at the largest k; exact mode, where the student has it, at each k and with a width chosen by the engine."""
    ks = [k for k in ks if 1 < k <= student.k]
    most = max(ks, default=student.k)
    ways = [DecodingWay(f"engine, fixed k={most}", student, most)]
    if student.design.exact_trunk:
        ways += [DecodingWay(f"engine, exact k={k}", student, k, exact=True) for k in ks]
        ways.append(DecodingWay("engine, exact k=auto", student, most, exact=True, adapt_width=True))
    return ways


def context_way(backbone: Any, k: int, coupling: str) -> DecodingWay:
    """The AR model alone in exact mode, which takes all drafts from the context."""
    return DecodingWay("engine, AR, drafts from the context", backbone, k, True, True, coupling)


def trained_ways(folder: str, ks: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Any, list[DecodingWay]]:
    """A trained student's AR model, inside it or beside it, and the ways of both to decode."""
    student = PushForwardLM.from_pretrained(folder).to(device, dtype)
    if student.design.exact_trunk:
        backbone: Any = student.backbone
    else:
        teacher = Path(folder).parent / "teacher"
        backbone = (
            AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="sdpa", trust_remote_code=False)
            .eval()
            .to(device, dtype)
        )
    coupling, ways = student.design.coupling, student_ways(student, ks)
    return backbone, [DecodingWay(AR, backbone, coupling=coupling), *ways, context_way(backbone, max(ks), coupling)]


def _on_cpu(model: Any) -> bool:
    return next(model.parameters()).device.type == "cpu"
