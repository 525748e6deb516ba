"""The methods that an evaluation trains and decodes beside the run's own students. To add one, add an entry to METHODS.

A *method* is trained once, in one process, until it has spent its FLOPs (rollouts and passes of the teacher count as
well). It then decodes in one or more ways, each of which is a row of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from kforcing.backbone import load_ar
from kforcing.baselines.assisted import AssistedDecoder, draft_model
from kforcing.baselines.base import Decoder, TextWindows
from kforcing.baselines.inversion import InversionStep, with_heads
from kforcing.baselines.mdlm import MaskedDecoder, MaskedLM, MaskedStep
from kforcing.baselines.medusa import MedusaDecoder, MedusaHeads, MedusaStep
from kforcing.baselines.ptp import PTPDecoder
from kforcing.coupling import COUPLINGS
from kforcing.design import Design, NoiseConfig
from kforcing.device import pick_device
from kforcing.distillation.steps import ARStep, TokenBatch
from kforcing.modeling import PushForwardLM
from kforcing.noise import sample_anchors, uniform
from pipelines.evaluation.decoders import EngineDecoder, MethodRow

# What a step learns from, made of real text: (tokens_BN, seq_B, noise key, k, windows of a sequence) → batch.


def sampled_windows(tokens_BN: Tensor, seq_B: Tensor, key: int, k: int, windows: int) -> TextWindows:
    """Windows of k tokens at random anchors."""
    last = tokens_BN.shape[1] - k
    return _with_noise(tokens_BN, sample_anchors(key, seq_B, last, min(windows, last)), seq_B, key, k)


def every_position(tokens_BN: Tensor, seq_B: Tensor, key: int, k: int, windows: int) -> TextWindows:
    """Every position as an anchor, with one uniform number each."""
    anchors = torch.arange(tokens_BN.shape[1]).expand(len(seq_B), -1)
    return _with_noise(tokens_BN, anchors, seq_B, key, 1)


def every_window(tokens_BN: Tensor, seq_B: Tensor, key: int, k: int, windows: int) -> TextWindows:
    """Every anchor with k + 1 tokens after it, for methods whose trunk reads all positions in any case."""
    anchors = torch.arange(tokens_BN.shape[1] - k - 1).expand(len(seq_B), -1)
    return _with_noise(tokens_BN, anchors, seq_B, key, k + 1)


def whole_sequences(tokens_BN: Tensor, seq_B: Tensor, key: int, k: int, windows: int) -> TokenBatch:
    """The tokens alone, for methods that are trained as AR models."""
    return TokenBatch(tokens_BN.to(pick_device()))


def _with_noise(tokens_BN: Tensor, anchors_BW: Tensor, seq_B: Tensor, key: int, length: int) -> TextWindows:
    noise = uniform(key, seq_B[:, None, None], anchors_BW[..., None], torch.arange(length))
    return TextWindows(*(x.to(pick_device()) for x in (tokens_BN, anchors_BW, noise)))


@dataclass(frozen=True)
class Method:
    """What a method is called, how it is built and trained, and how it decodes."""

    description: str
    """For the report, after the method's key."""
    label: str
    """For the legends of plots."""
    rows: Callable[[int, list[int], str], list[MethodRow]]
    """(tokens a step it was trained for, smaller numbers worth decoding, coupling) → its rows."""
    build: Callable[[Any, int, NoiseConfig], Any] | None = None
    """(AR model, k, noise encoder) → the untrained model. None for K-Forcing, which is trained stage by stage."""
    step: Callable[[Any, Any], nn.Module] | None = None
    """(model, AR model) → the module that maps a batch to `LossSums`."""
    batch: Callable[[Tensor, Tensor, int, int, int], Any] = sampled_windows
    """What the step learns from: one of the functions above."""
    decoders: dict[str, Callable[[Any, Callable[[], Any], MethodRow], Decoder]] = field(default_factory=dict)
    """For each `decoder` of its rows: (trained model, function that loads the AR model, row) → decoder."""
    teacher_lr: bool = False
    """Whether it is trained at the learning rate of the AR model's own training, where the run trained the AR model."""

    @property
    def staged(self) -> bool:
        """Whether it is K-Forcing."""
        return self.build is None


def _inversion_student(ar: Any, k: int, noise: NoiseConfig) -> PushForwardLM:
    return PushForwardLM.from_backbone(ar, k, Design(noise=noise))


def _in_engine(model: Any, ar: Callable[[], Any], row: MethodRow) -> Decoder:
    return EngineDecoder(model, row.k, row.coupling)


def _kforcing_rows(method: str, k: int, ks: list[int], coupling: str) -> list[MethodRow]:
    return [MethodRow(f"K-Forcing, {method}, k{k} at k={n}", n, "engine", method, coupling=coupling) for n in ks]


def _sequential_rows(k: int, ks: list[int], coupling: str) -> list[MethodRow]:
    name = f"K-Forcing, sequential, k{k}, exact at k={k}"
    exact = MethodRow(name, k, "engine", "sequential", coupling=coupling, exact=True)
    return [*_kforcing_rows("sequential", k, ks, coupling), exact]


METHODS = {
    "paper": Method(
        "K-Forcing, the paper's recipe: AR → k=1 → k=2 → …, self-forcing, argmax read-out",
        "K-Forcing, paper",
        partial(_kforcing_rows, "paper"),
    ),
    "sequential": Method(
        "K-Forcing, sequential recipe: exact trunk, parallel hints, a small head, soft AR targets",
        "K-Forcing, sequential",
        _sequential_rows,
    ),
    "head": Method(
        "one-layer sequential head on the AR trunk, without hints and without verification",
        "sequential head alone",
        lambda k, ks, coupling: [MethodRow(f"sequential head alone, k={k}", k, "engine", "head", coupling=coupling)],
    ),
    "inversion-heads": Method(
        "noise inversion A: one hint that carries all noises, and k heads",
        "noise inversion A",
        lambda k, ks, coupling: [MethodRow(f"noise inversion A (heads), k={k}", k, "engine", "inversion-heads")],
        build=lambda ar, k, noise: with_heads(_inversion_student(ar, k, noise)),
        step=InversionStep,
        decoders={"engine": _in_engine},
    ),
    "inversion-causal": Method(
        "noise inversion B: causal hints; its student is also the draft of PTP",
        "noise inversion B; PTP",
        lambda k, ks, coupling: [
            MethodRow(f"noise inversion B (causal), k={k}", k, "engine", "inversion-causal"),
            MethodRow(f"PTP, k={k}, verified", k, "ptp", "inversion-causal"),
        ],
        build=_inversion_student,
        step=InversionStep,
        decoders={"engine": _in_engine, "ptp": lambda model, ar, row: PTPDecoder(model, ar())},
    ),
    "mdlm": Method(
        "masked diffusion that starts from the AR model's weights",
        "MDLM",
        lambda k, ks, coupling: [
            MethodRow(f"MDLM, {n} a pass", n, "mdlm", "mdlm", same_noise=False) for n in ks if n & (n - 1) == 0
        ],
        build=lambda ar, k, noise: MaskedLM(ar),
        step=lambda model, ar: MaskedStep(model),
        batch=every_position,
        decoders={"mdlm": lambda model, ar, row: MaskedDecoder(model, row.k)},
    ),
    "medusa": Method(
        "Medusa heads, whose guesses the AR model verifies",
        "Medusa",
        lambda k, ks, coupling: [MethodRow(f"Medusa, k={k}, verified", k, "medusa", "medusa", coupling="gumbel")],
        build=lambda ar, k, noise: MedusaHeads(ar, k),
        step=lambda model, ar: MedusaStep(ar, model),
        batch=every_window,
        decoders={"medusa": lambda model, ar, row: MedusaDecoder(ar(), model, COUPLINGS[row.coupling])},
    ),
    "draft": Method(
        "a one-layer AR model that drafts for the assisted generation of `transformers`",
        "assisted",
        lambda k, ks, coupling: [MethodRow("transformers, assisted", 0, "assisted", "draft", same_noise=False)],
        build=lambda ar, k, noise: draft_model(ar),
        step=lambda model, ar: ARStep(model),
        batch=whole_sequences,
        decoders={"assisted": lambda model, ar, row: AssistedDecoder(ar(), model)},
        teacher_lr=True,
    ),
}
STAGED = tuple(name for name, method in METHODS.items() if method.staged)


def rows_of(
    methods: list[str],
    students: list[tuple[str, str, int, str]],
    k: int,
    ks: list[int],
    designs: dict[str, Design],
    exact: tuple[str, str, int, str] | None = None,
) -> list[MethodRow]:
    """The rows of the table: the AR model, then the run's students, then the methods.

    Args:
        methods: keys of METHODS.
        students: (name, folder, tokens a step, coupling) of the run's students.
        k: tokens a step that the methods are trained for.
        ks: the numbers of tokens a step at which K-Forcing and MDLM are decoded.
        designs: of the students of methods that are trained stage by stage.
        exact: the one of the students that is decoded in exact mode, too.
    """
    rows = [MethodRow("AR, engine", 1, "ar")]
    if "gumbel" in {*(coupling for *_, coupling in students), *(design.coupling for design in designs.values())}:
        rows.append(MethodRow("AR, engine, Gumbel", 1, "ar", coupling="gumbel"))
    rows.append(MethodRow("AR, transformers", 1, "transformers", same_noise=False))
    for name, path, n, coupling in students:
        rows.append(MethodRow(f"this run, {name} at k={n}", n, "engine", path=path, coupling=coupling))
    if exact:
        name, path, n, coupling = exact
        for width, adapt in ((str(n), False), ("auto", True)):
            row = MethodRow(f"this run, {name}, exact at k={width}", n, "engine", path=path, coupling=coupling)
            rows.append(dataclasses.replace(row, exact=True, adapt_width=adapt))
    for method in methods:
        design = designs.get(method, Design())
        rows += [r for r in METHODS[method].rows(k, ks, design.coupling) if design.exact_trunk or not r.exact]
    return rows


def decoder_of(
    row: MethodRow, teacher: str, trained: Path | None, k: int, noise: NoiseConfig, temperature: float = 1.0
) -> Decoder:
    """The decoder of a row, on the device that this process was given.

    Args:
        teacher: folder of the AR model.
        trained: folder in which the row's method was trained.
        k: tokens a step that the method was trained for.
        noise: noise encoder of argmax students.
    """
    device = pick_device()

    def ar() -> Any:
        return load_ar(teacher).to(device)

    if row.decoder == "ar":
        return EngineDecoder(ar(), 1, row.coupling, temperature)
    if row.decoder == "transformers":
        return AssistedDecoder(ar(), None)
    method = METHODS[row.method] if row.method else None
    if method is None or method.build is None:
        student = PushForwardLM.from_pretrained(row.path or f"{trained}/k{k}").to(device)
        return EngineDecoder(student, row.k, row.coupling, temperature, row.exact, row.adapt_width)
    model = method.build(load_ar(teacher), k, noise)
    load_model(model, f"{trained}/model.safetensors")
    return method.decoders[row.decoder](model.to(device).eval(), ar, row)
