"""Training in one process: the steps of the pipeline without its distribution, for comparisons of small models.

FLOPs are counted, so that all methods of a comparison can have the same budget.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from kforcing.device import pick_device
from kforcing.distillation.losses import LossSums
from kforcing.distillation.steps import StudentStep
from kforcing.keys import derive_key
from kforcing.metrics.flops import flop_counter
from pipelines.config.schema import TrainConfig
from pipelines.config.stages import StageSpec
from pipelines.data.token_store import TokenStore
from pipelines.failures import Exit
from pipelines.files import atomic_file, read_json, write_json
from pipelines.log import log
from pipelines.rollouts.actor import RolloutActor
from pipelines.rollouts.plan import StepPlan
from pipelines.runs.stages import StageError
from pipelines.training.guard import Diverged, StepFigures, explain
from pipelines.training.job import TrainJob, fit_candidates, micro_batches, stage_job
from pipelines.training.schedule import ema_decay, on_policy_fraction, set_learning_rates

KEEP_EVERY_S = 30.0


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimiser step."""

    batch: float
    """Making the batch: the passes of the teacher."""
    train: float
    """Forward and backward of what is trained."""

    @property
    def total(self) -> float:
        """The sum of both."""
        return self.batch + self.train

    def times(self, n: float) -> StepFlops:
        """The FLOPs of n such steps."""
        return StepFlops(n * self.batch, n * self.train)


Batches = Callable[[int, int], list[Any]]
"""(step, steps) → the micro-batches of a step."""


def count_step(module: nn.Module, batches: Batches) -> StepFlops:
    """The FLOPs of the first step, counted on the device of this process."""
    module.to(pick_device())
    with flop_counter() as making:
        micro = batches(0, 1)
    with flop_counter() as training:
        for batch in micro:
            module(batch).loss.backward()
    module.zero_grad()
    return StepFlops(making.get_total_flops(), training.get_total_flops())


def train_here(
    module: nn.Module,
    batches: Batches,
    train: TrainConfig,
    name: str,
    place: tuple[str, int],
    checkpoint: Path | None = None,
    watch: Callable[[int, LossSums], None] | None = None,
) -> float:
    """Make `train.steps` optimiser steps, and set the weights to their moving average. Returns the seconds that it took.

    With `train.precision=bf16`, products are computed in bf16; weights and their optimiser states stay in fp32.

    Args:
        module: maps a batch to `LossSums`; it is moved to the device of this process.
        batches: the micro-batches of each step.
        name: for progress lines.
        place: folder of the store that the batches are made from, and the seed of its order; errors name them.
        checkpoint: file from which a killed training continues; it is removed at the end.
        watch: called with the number of each step and its sums.
    Raises:
        StageError: when training diverges.
    """
    module.to(pick_device())
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizers = make_optimizers(module, train)
    average = [p.detach().clone() for p in trained]
    first, earlier = _resume(checkpoint, trained, optimizers, average)
    started = kept = time.monotonic()
    for step in range(first, train.steps):
        for optimizer in optimizers:
            set_learning_rates(optimizer.param_groups, step, train, muon=isinstance(optimizer, torch.optim.Muon))
            optimizer.zero_grad()
        total = _backward(module, batches(step, train.steps), bf16=train.precision == "bf16")
        loss, tokens = total.loss.item(), total.tokens
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        gradient = clip_grad_norm_(trained, train.clip_norm or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        try:
            StepFigures(loss / tokens, gradient.item(), get_total_norm(trained).item()).check(train.max_loss)
        except Diverged as error:
            good = str(checkpoint) if checkpoint and checkpoint.is_file() else None
            raise StageError(f"{name}: {explain(error, step, train, place, good)}", Exit.DIVERGED) from None
        _follow(average, trained, ema_decay(step, train.ema))
        if watch:
            watch(step, total)
        if step % 200 == 199:
            log.info(f"{name}  {step + 1}/{train.steps}  loss {loss / tokens:.3f}")
        if checkpoint and time.monotonic() - kept > KEEP_EVERY_S:
            kept = time.monotonic()
            _keep(checkpoint, step + 1, earlier + kept - started, trained, optimizers, average)
    _follow(trained, average, 0.0)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return earlier + time.monotonic() - started


def _backward(module: nn.Module, micro_batches: list[Any], bf16: bool) -> LossSums:
    """Add the gradients of all micro-batches of a step to the parameters; returns their sums."""
    total: LossSums | None = None
    for batch in micro_batches:
        with torch.autocast(pick_device().type, torch.bfloat16, enabled=bf16):
            sums = module(batch)
        sums.loss.backward()
        sums.loss = sums.loss.detach()
        total = sums if total is None else total + sums
    assert total is not None
    return total


def make_optimizers(module: nn.Module, train: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all trained parameters; with `train.muon_lr`, Muon for matrices and AdamW for the rest.

    As in DeepSpeed, a matrix is every parameter of two dimensions whose name contains neither `embed` nor `lm_head`.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = train.muon_lr and parameter.ndim == 2 and not re.search("embed|lm_head", name.lower())
            (matrices if matrix else rest).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if rest:
        betas = (train.beta1, train.beta2)
        found.append(torch.optim.AdamW(rest, train.lr, betas, train.eps, train.weight_decay))
    if matrices:
        assert train.muon_lr
        found.append(torch.optim.Muon(matrices, train.muon_lr, train.weight_decay, adjust_lr_fn="original"))
    return found


def shortened(train: TrainConfig, steps: int) -> TrainConfig:
    """The same training with another number of steps; the warm-up takes the same share of them, or less."""
    return dataclasses.replace(train, steps=steps, warmup=round(train.warmup * min(1.0, steps / train.steps)))


@torch.no_grad()
def _follow(means: list[Any], values: list[Any], decay: float) -> None:
    for mean, value in zip(means, values, strict=True):
        mean.lerp_(value, 1 - decay)


def _keep(file: Path, step: int, seconds: float, trained: Any, optimizers: Any, average: Any) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"step": step, "seconds": seconds, "optimizers": states, "average": average}
    with atomic_file(file) as partial:
        torch.save({**state, "trained": [p.detach() for p in trained]}, partial)


def _resume(file: Path | None, trained: Any, optimizers: Any, average: Any) -> tuple[int, float]:
    if file is None or not file.is_file():
        return 0, 0.0
    if not is_whole(file):
        log.warning(f"{file} does not hold what was written to it; its training starts anew")
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    states = state.get("optimizers") or [state["optimizer"]]  # earlier releases had one
    for optimizer, kept in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(kept)
    _follow(trained, state["trained"], 0.0)
    _follow(average, state["average"], 0.0)
    return state["step"], state["seconds"]


def is_whole(file: Path) -> bool:
    """Whether a file of `torch.save` holds what was written to it: such files are zip archives, which have checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a flipped byte of a header raises many kinds
        return False


class LocalStudent:
    """Trains the stages of a student, rollouts included, one after the other.

    Args:
        stages: what each stage computes.
        teacher: folder of the AR model.
        store: folder of the training tokens.
        folder: where each stage's student goes.
        name: for progress lines.
    """

    def __init__(self, stages: Sequence[StageSpec], teacher: str, store: str, folder: str, name: str):
        self.stages = {spec.k: spec for spec in stages}
        self.teacher, self.folder, self.name = teacher, Path(folder), name
        self.store = TokenStore(store, stages[0].seed)
        self.spent = 0.0

    def stage(self, k: int, steps: int | None, budget: float | None, previous: Path | None) -> dict[str, Any]:
        """Train PFLM(k) for `steps` steps, or until a FLOP budget is spent. Returns what it cost.

        A stage that has been trained before is kept.
        """
        record = self.folder / f"k{k}.json"
        if cost := read_json(record):
            self.spent += cost["flops"]
            return cost
        job = self._job(k, previous)
        module = _module(job)
        cost = {"flops": 0.0, "step_flops": 0.0, "batch_flops": 0.0, "steps": 0, "seconds": 0.0}
        if self.stages[k].learns:
            cost = self._train(module, job, k, steps, budget)
        fit_candidates(job, module.model)
        module.model.save_pretrained(self.folder / f"k{k}")
        write_json(record, cost)
        return cost

    def count(self, k: int, previous: Path | None) -> StepFlops:
        """The FLOPs of one step of a stage, averaged over its steps with and without on-policy windows."""
        job = self._job(k, previous)
        return self._count(_module(job), job, k)

    def untrained(self, k: int, previous: Path | None) -> Path:
        """The student that a stage begins with, in a folder."""
        _module(self._job(k, previous)).model.save_pretrained(self.folder / f"untrained-k{k}")
        return self.folder / f"untrained-k{k}"

    def _job(self, k: int, previous: Path | None) -> TrainJob:
        before = None if previous is None else str(previous)
        return stage_job(self.stages[k], str(self.folder / f"k{k}"), str(self.store.folder), self.teacher, before)

    def _train(
        self, module: StudentStep, job: TrainJob, k: int, steps: int | None, budget: float | None
    ) -> dict[str, Any]:
        flops = self._count(module, job, k)
        if steps is None:
            assert budget is not None
            steps = max(1, round((budget - self.spent) / flops.total))
        self.folder.mkdir(parents=True, exist_ok=True)
        train = shortened(job.train, steps)
        rolled_out = self._rolled_out(job, k, train.batch)

        def batches(step: int, steps: int) -> list[Any]:
            return rolled_out(step, on_policy_fraction(step, train))

        place = str(self.store.folder), self.store.seed
        seconds = train_here(module, batches, train, f"{self.name}  k{k}", place, self.folder / f"k{k}.pt")
        self.spent += steps * flops.total
        return {
            "flops": steps * flops.total,
            "step_flops": flops.total,
            "batch_flops": steps * flops.batch,
            "steps": steps,
            "seconds": seconds,
            "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }

    def _rolled_out(self, job: TrainJob, k: int, batch: int) -> Callable[[int, float], list[Any]]:
        """A function of a step and its on-policy fraction, which returns the step's rows in micro-batches."""
        assert job.rollout_job is not None or job.text_k
        actor = RolloutActor(dataclasses.replace(job.rollout_job, threads=1)) if job.rollout_job else None
        key, micro = derive_key(job.seed, k, "own"), min(batch, job.train.micro_batch)

        def step_of(step: int, own: float) -> list[Any]:
            rows = self.store.read(StepPlan(batch, 1, step + 1, step, 1).positions(0))
            return micro_batches(job, actor(rows) if actor else rows, micro, key, own)

        return step_of

    def _count(self, module: StudentStep, job: TrainJob, k: int) -> StepFlops:
        """The FLOPs of a step, from one micro-batch."""
        train = job.train
        rolled_out = self._rolled_out(job, k, train.micro_batch)
        flops = count_step(module, lambda *_: rolled_out(0, 0.0))
        if train.on_policy_fraction:
            own = count_step(module, lambda *_: rolled_out(0, train.on_policy_fraction))
            flops = StepFlops(flops.batch, train.on_policy_from * flops.train + (1 - train.on_policy_from) * own.train)
        return flops.times(train.batch / train.micro_batch)


def _module(job: TrainJob) -> StudentStep:
    module: Any = job.init.build()
    return module.eval()
