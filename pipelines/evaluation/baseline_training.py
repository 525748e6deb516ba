"""Training of the baselines: every method gets the same share of the FLOPs that the run's own students had."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from kforcing.backbone import load_ar
from kforcing.design import Design, NoiseConfig, SequentialConfig
from kforcing.device import pick_device
from kforcing.keys import derive_key
from pipelines.config.schema import TrainConfig, doubling
from pipelines.config.stages import StageSpec
from pipelines.data.rows import sequences_of, tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.evaluation.baselines import METHODS
from pipelines.rollouts.plan import StepPlan
from pipelines.training.single_process import Batches, LocalStudent, count_step, shortened, train_here


@dataclass(frozen=True)
class BaselineTraining:
    """A method to train, with all that its process needs."""

    method: str
    """Key of METHODS."""
    shared: StageSpec
    """The run's own optimiser, rollouts and design."""
    teacher_train: TrainConfig | None
    """How the run trained its AR model; None for a given one."""
    teacher: str
    """Folder of the AR model."""
    store: str
    """Folder of the training tokens."""
    k: int
    seed: int
    share: float
    """Share of the run's FLOPs that the method may spend."""


def train_baseline(folder: Path, training: BaselineTraining, given: dict[str, Any]) -> dict[str, Any]:
    """Train a method until it has spent its share of the run's FLOPs (the result of part `cost`).

    A training that was killed continues from its checkpoint.

    Returns:
        FLOPs (`batch_flops` for batches alone), steps, seconds, and the number of trained parameters.
    """
    budget, method = training.share * given["cost"]["flops"], METHODS[training.method]
    if method.build is None:
        return _train_stages(folder, training, budget)
    assert method.step is not None
    teacher, micro = load_ar(training.teacher).to(pick_device()), training.shared.train.micro_batch
    torch.manual_seed(training.seed)
    model = method.build(load_ar(training.teacher), training.k, noise_of(training.shared.design))
    module = method.step(model, teacher)
    flops = count_step(module, _batches(training, micro)).times(training.shared.train.batch / micro)
    train = _train_config(training, max(1, round(budget / flops.total)))
    store = TokenStore(training.store, training.seed)
    checkpoint = folder / "training.pt"
    seconds = train_here(
        module, _batches(training, train.batch), train, training.method, (str(store.folder), store.seed), checkpoint
    )
    save_model(model, str(folder / "model.safetensors"))
    return {
        "flops": train.steps * flops.total,
        "batch_flops": train.steps * flops.batch,
        "steps": train.steps,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def noise_of(design: Design) -> NoiseConfig:
    """The noise encoder of all argmax students: the run's own, where its design has one."""
    return NoiseConfig(min_cycles=0.25, max_cycles=32.0) if design.conditional else design.noise


def _train_config(training: BaselineTraining, steps: int) -> TrainConfig:
    train, teacher = training.shared.train, training.teacher_train
    if METHODS[training.method].teacher_lr and teacher is not None:
        train = dataclasses.replace(train, lr=teacher.lr, muon_lr=teacher.muon_lr)
    return shortened(train, steps)


def _batches(training: BaselineTraining, batch: int) -> Batches:
    """Step → micro-batches of real text, which are the same for all methods with the same `Method.batch`."""
    store, shared = TokenStore(training.store, training.seed), training.shared
    micro, make = min(batch, shared.train.micro_batch), METHODS[training.method].batch

    def batches(step: int, steps: int) -> list[Any]:
        rows = store.read(StepPlan(batch, 1, step + 1, step, 1).positions(0))
        tokens, seq = tokens_of(rows), sequences_of(rows)
        key = derive_key(training.seed, training.method, rows["epoch"][0].as_py())
        parts = [slice(i, i + micro) for i in range(0, batch, micro)]
        return [make(tokens[part], seq[part], key, training.k, shared.rollout.windows) for part in parts]

    return batches


def _train_stages(folder: Path, training: BaselineTraining, budget: float) -> dict[str, Any]:
    """Train K-Forcing stage by stage."""
    stages = method_stages(training.method, training.shared, training.k, training.seed)
    student = LocalStudent(stages, training.teacher, training.store, str(folder), training.method)
    previous, costs = None, []
    for k, share in spent_by(training.method, [stage.k for stage in stages]).items():
        costs.append(student.stage(k, None, share * budget, previous))
        previous = folder / f"k{k}"
    totals = {name: sum(c[name] for c in costs) for name in ("flops", "batch_flops", "steps", "seconds")}
    return {**totals, "trained_parameters": costs[-1]["trained_parameters"]}


def spent_by(method: str, ks: list[int]) -> dict[int, float]:
    """Share of K-Forcing's budget that is spent by the end of each stage.

    The paper's recipe spends equally in all stages. A sequential student learns nothing at k = 1 and most at its last k.
    """
    if method == "paper":
        return {k: (i + 1) / len(ks) for i, k in enumerate(ks)}
    return {k: 0.15 * i / max(1, len(ks) - 2) if k < ks[-1] else 1.0 for i, k in enumerate(ks)}


def method_design(method: str, own: Design) -> Design:
    """The design of a K-Forcing method: `paper`, `sequential` or `head`. The run's own, where it is of the same kind."""
    if (method == "sequential") == own.conditional and method != "head":
        return own
    designs = {
        "paper": Design(noise=noise_of(own)),
        "sequential": Design("sequential", "gumbel", sequential=SequentialConfig()),
        "head": Design("sequential", "gumbel", sequential=SequentialConfig(hints="none", draft="none")),
    }
    return designs[method]


def method_stages(method: str, shared: StageSpec, k: int, seed: int) -> list[StageSpec]:
    """The stages of a K-Forcing method, with the run's own optimiser and rollouts."""
    soft = method != "paper"
    labels = (shared.rollout.teacher_top_k or 32) if soft else None
    last = dataclasses.replace(
        shared,
        seed=seed,
        targets="ar" if soft else "self",
        loss="soft" if soft else "hard",
        design=method_design(method, shared.design),
        train=dataclasses.replace(shared.train, warm_start="previous", on_policy_fraction=0.0),
        rollout=dataclasses.replace(shared.rollout, teacher_top_k=labels, cache=False),
    )
    return [dataclasses.replace(last, name=f"k{n}", k=n).consistent() for n in doubling(k)]
