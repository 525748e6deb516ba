"""Every other way to several tokens a pass, trained under one budget and decoded: the rows of the rivals' table.

A *method* is trained once, in one process, until it has spent its FLOPs (rollouts and teacher passes count). A *row* is a
way to decode: a method at a number of tokens a step, the AR model, or a student of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from kforcing.coupling import COUPLINGS
from kforcing.engine import Engine, EngineConfig, Request, Sampling
from kforcing.model import Design, NoiseConfig, PushForwardLM, SequentialConfig
from kforcing.noise import derive_key, sample_anchors, uniform
from kforcing.rivals.assisted import AssistedDecoder, draft_model
from kforcing.rivals.inversion import InversionStep, with_heads
from kforcing.rivals.mdlm import MaskedDecoder, MaskedLM, MaskedStep
from kforcing.rivals.medusa import MedusaDecoder, MedusaStep
from kforcing.rivals.ptp import PTPDecoder
from kforcing.rivals.rows import Decoded, Decoder, TextWindows
from pipelines.config import Config, TrainConfig
from pipelines.local import LocalStudent, count_step, train_here
from pipelines.rollout import StepPlan, load_ar, pick_device
from pipelines.step import ARStep, TokenBatch
from pipelines.store import TokenStore, to_numpy

NOISE = NoiseConfig(min_cycles=0.25, max_cycles=32.0)
EARLY = {"paper": {1: 0.3, 2: 0.6}, "sequential": {2: 0.15}, "head": {2: 0.15}}
"""Share of a K-Forcing method's budget that is spent by the end of an earlier stage."""


@dataclass(frozen=True)
class Trial:
    """A method to train."""

    method: str
    config: Config
    """Of the run: its data, optimiser and windows."""
    teacher: str
    store: str
    k: int
    seed: int
    share: float


@dataclass(frozen=True)
class Row:
    """A way to decode."""

    name: str
    k: int
    """Tokens a step, at most."""
    decoder: str
    """What decodes: `ar`, `transformers`, `engine` (a push-forward student), or a rival's own."""
    method: str | None = None
    """What was trained for it here; none for the AR model and the run's students."""
    path: str = ""
    """Folder of a student of the run."""
    coupling: str = "inverse_cdf"
    """By which noise becomes tokens, in its AR counterpart too."""
    same_noise: bool = True
    """Whether it can be compared with the AR model token by token."""


METHODS = {
    "paper": "K-Forcing, the paper's recipe: AR → k=1 → k=2 → …, self-forcing, argmax read-out",
    "sequential": "K-Forcing, sequential recipe: exact trunk, parallel hints, a small head, soft AR targets",
    "head": "one-layer sequential head on the AR trunk, no hints, no verification",
    "inversion-heads": "noise inversion A: one hint with all noises, k heads",
    "inversion-causal": "noise inversion B: causal hints; also the draft of PTP",
    "mdlm": "masked diffusion from the AR model's weights",
    "medusa": "Medusa heads, verified by the AR model",
    "draft": "one-layer AR draft model for assisted generation",
}


def rows_of(methods: list[str], students: list[tuple[str, str, int, str]], k: int, ks: list[int]) -> list[Row]:
    """The rows of the table: AR twice, the run's students, then what the methods allow.

    Args:
        students: (name, folder, tokens a step, coupling) of the run's students.
        k: tokens a step of the methods.
        ks: tokens a step at which K-Forcing is decoded.
    """
    rows = [Row("AR, engine", 1, "ar"), Row("AR, transformers", 1, "transformers", same_noise=False)]
    rows += [
        Row(f"this run, {name} at k={n}", n, "engine", path=path, coupling=coupling)
        for name, path, n, coupling in students
    ]
    made: dict[str, list[Row]] = {
        "paper": [Row(f"K-Forcing, paper, k={n}", n, "engine", "paper") for n in ks],
        "sequential": [Row(f"K-Forcing, sequential, k={n}", n, "engine", "sequential", coupling="gumbel") for n in ks],
        "head": [Row(f"sequential head alone, k={k}", k, "engine", "head", coupling="gumbel")],
        "inversion-heads": [Row(f"noise inversion A (heads), k={k}", k, "engine", "inversion-heads")],
        "inversion-causal": [
            Row(f"noise inversion B (causal), k={k}", k, "engine", "inversion-causal"),
            Row(f"PTP, k={k}, verified", k, "ptp", "inversion-causal"),
        ],
        "mdlm": [Row(f"MDLM, {n} a pass", n, "mdlm", "mdlm", same_noise=False) for n in ks if n & (n - 1) == 0],
        "medusa": [Row(f"Medusa, k={k}, verified", k, "medusa", "medusa", coupling="gumbel")],
        "draft": [Row("transformers, assisted", 0, "assisted", "draft", same_noise=False)],
    }
    return rows + [row for method in methods for row in made[method]]


def method_config(method: str, config: Config, k: int, seed: int) -> Config:
    """The run's config turned to a K-Forcing method."""
    student = dataclasses.replace(config.student, k=k)
    designs = {
        "paper": Design(noise=NOISE),
        "sequential": Design("sequential", "gumbel", sequential=SequentialConfig()),
        "head": Design("sequential", "gumbel", sequential=SequentialConfig(hints="none", draft="none")),
    }
    own = config.student.design
    design = own if (method == "sequential") == own.conditional and method != "head" else designs[method]
    train = dataclasses.replace(config.train, warm_start="previous", own_windows=0.0)
    soft = method != "paper"
    rollout = dataclasses.replace(config.rollout, top_m=(config.rollout.top_m or 32) if soft else None, cache=False)
    return dataclasses.replace(
        config,
        seed=seed,
        targets="ar" if soft else "self",
        loss="soft" if soft else "hard",
        student=dataclasses.replace(student, design=design),
        train=train,
        rollout=rollout,
        stages={},
    )


def train_rival(folder: Path, trial: Trial, given: dict[str, Any]) -> dict[str, Any]:
    """Train a method to its share of the run's FLOPs (part `cost`); what it cost. A killed training continues."""
    budget = trial.share * given["cost"]["flops"]
    if trial.method in EARLY:
        return _train_stages(folder, trial, budget)
    module, batch_at = _module(trial.method, trial), _batches(trial)
    flops = count_step(module, batch_at)
    train = _train_config(trial, max(1, round(budget / flops.total)))
    seconds = train_here(module, batch_at, train, trial.method, folder / "training.pt")
    save_model(_kept(module), str(folder / "model.safetensors"))
    return {
        "flops": train.steps * flops.total,
        "batch_flops": train.steps * flops.batch,
        "steps": train.steps,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def _train_stages(folder: Path, trial: Trial, budget: float) -> dict[str, Any]:
    config = method_config(trial.method, trial.config, trial.k, trial.seed)
    student = LocalStudent(config, trial.teacher, trial.store, str(folder), trial.method)
    previous, costs = None, []
    for k in config.ks():
        share = EARLY[trial.method].get(k, 1.0) if k < trial.k else 1.0
        costs.append(student.stage(k, None, share * budget, previous))
        previous = folder / f"k{k}"
    totals = {name: sum(c[name] for c in costs) for name in ("flops", "batch_flops", "steps", "seconds")}
    return {**totals, "trained_parameters": costs[-1]["trained_parameters"]}


def _train_config(trial: Trial, steps: int) -> TrainConfig:
    train = trial.config.train
    if trial.method == "draft" and trial.config.teacher.path is None:
        train = dataclasses.replace(train, lr=trial.config.teacher.train.lr)
    return dataclasses.replace(train, steps=steps)


def _module(method: str, trial: Trial) -> nn.Module:
    """What is trained, untrained."""
    torch.manual_seed(trial.seed)
    teacher, k = load_ar(trial.teacher), trial.k
    if method.startswith("inversion"):
        student = PushForwardLM.from_backbone(teacher, k, Design(noise=NOISE))
        student = with_heads(student) if method == "inversion-heads" else student
        return InversionStep(student, load_ar(trial.teacher))
    if method == "medusa":
        return MedusaStep(teacher, k)
    if method == "mdlm":
        return MaskedStep(MaskedLM(teacher))
    assert method == "draft"
    return ARStep(draft_model(teacher))


def _kept(module: nn.Module) -> nn.Module:
    """The part of a training module that decoding needs."""
    name = {InversionStep: "student", MedusaStep: "heads", MaskedStep: "model", ARStep: "model"}[type(module)]
    return getattr(module, name)


def _batches(trial: Trial) -> Callable[[int, int], Any]:
    """Step → its batch of real text, the same for any method of one shape."""
    store, config, k = TokenStore(trial.store, trial.seed), trial.config, trial.k

    def batch_at(step: int, steps: int) -> Any:
        rows = store.read(StepPlan(config.train.batch, 1, step + 1, step, 1).positions(0))
        tokens = torch.from_numpy(to_numpy(rows["tokens"]).astype(np.int64))
        if trial.method == "draft":
            return TokenBatch(tokens)
        seq = torch.from_numpy(rows["seq"].to_numpy().copy())
        N = tokens.shape[1]
        key = derive_key(trial.seed, trial.method, rows["epoch"][0].as_py())
        if trial.method == "mdlm":
            anchors, offsets = torch.arange(N).expand(len(seq), -1), torch.zeros(1, dtype=torch.int64)
        else:
            anchors = sample_anchors(key, seq, N - k, min(config.rollout.windows, N - k))
            offsets = torch.arange(k)
        return TextWindows(tokens, anchors, uniform(key, seq[:, None, None], anchors[..., None], offsets))

    return batch_at


class EngineDecoder:
    """The decode engine as a `Decoder`."""

    def __init__(self, model: Any, k: int, coupling: str, temperature: float = 1.0):
        self.model, self.k, self.coupling, self.temperature = model, k, coupling, temperature
        self._engine: Engine | None = None

    def decode(self, prompts_RN: Tensor, new_tokens: int, seeds: list[int]) -> Decoded:
        """See `Decoder`."""
        R, N = prompts_RN.shape
        if self._engine is None or (self._engine.config.slots, self._engine.max_len) != (R, N + new_tokens):
            config = EngineConfig(
                slots=R, max_len=N + new_tokens, k=self.k, prefill_tokens=R * N, coupling=self.coupling
            )
            self._engine = Engine(self.model, config)
        steps, sampling = self._engine.counts.steps, Sampling(temperature=self.temperature)
        requests = [
            Request(p, new_tokens, seed=s, sampling=sampling) for p, s in zip(prompts_RN.tolist(), seeds, strict=True)
        ]
        done = self._engine.generate(requests)
        passes = (self._engine.counts.steps - steps) / new_tokens
        return Decoded(torch.tensor([c.tokens for c in done]), passes, R * new_tokens)


def decoder_of(row: Row, teacher: str, trained: Path | None, k: int, temperature: float = 1.0) -> Decoder:
    """The decoder of a row, on the device this process was given.

    Args:
        trained: folder of the row's method.
        k: tokens a step the method was trained for.
    """
    device = pick_device()
    ar = load_ar(teacher).to(device)
    if row.decoder == "ar":
        return EngineDecoder(ar, 1, row.coupling, temperature)
    if row.decoder == "transformers":
        return AssistedDecoder(ar, None)
    if row.path:
        return EngineDecoder(PushForwardLM.from_pretrained(row.path).to(device), row.k, row.coupling, temperature)
    assert row.method is not None
    assert trained is not None
    if row.method in EARLY:
        student = PushForwardLM.from_pretrained(trained / f"k{k}").to(device)
        return EngineDecoder(student, row.k, row.coupling, temperature)
    model: Any = _kept(_module(row.method, Trial(row.method, Config(""), teacher, "", k, 0, 0)))
    load_model(model, str(trained / "model.safetensors"))
    model = model.to(device).eval()
    if row.decoder == "engine":
        return EngineDecoder(model, row.k, row.coupling)
    if row.decoder == "ptp":
        return PTPDecoder(model, ar)
    if row.decoder == "medusa":
        return MedusaDecoder(ar, model, COUPLINGS[row.coupling])
    if row.decoder == "mdlm":
        return MaskedDecoder(model, row.k)
    return AssistedDecoder(ar, model)
