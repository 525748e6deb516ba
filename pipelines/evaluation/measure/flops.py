"""FLOPs of the run's training, and of a decoded token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kforcing.backbone import load_ar
from kforcing.device import pick_device
from kforcing.distillation.steps import ARStep, TokenBatch
from kforcing.metrics.flops import attention_step, measured_step, predicted_ar_step
from kforcing.modeling import PushForwardLM
from pipelines.config.schema import TrainConfig
from pipelines.data.rows import tokens_of
from pipelines.data.token_store import TokenStore
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.subject import Subject
from pipelines.rollouts.plan import StepPlan
from pipelines.training.single_process import LocalStudent, count_step


def training_and_decoding_flops(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """FLOPs of the run's stages, counted on one real step of each, and FLOPs a token of the AR model and the students.

    Returns:
        `stages`: rollout and training FLOPs of each. `flops`: their sum without the teacher's stage. `decoding`: FLOPs a
        token of the AR model (first) and of each student at each k.
    """
    subject, specs = measurement.subject, measurement.subject.run.students
    stages = []
    if subject.run.teacher.train is not None:
        stages.append(_teacher_flops(subject, subject.run.teacher.train))
    local, previous = LocalStudent(specs, subject.teacher, subject.train, str(folder), "count"), None
    have = {student.k: Path(student.path) for student in subject.students}
    for stage in specs:
        k = stage.k
        if stage.learns:
            flops, steps = local.count(k, previous), stage.train.steps
            times = 1 / stage.rollout.cache_epochs if stage.rollout.cache else 1.0  # cached rollouts are made once
            rollouts, train = steps * flops.batch * times, steps * flops.train
            stages.append({"name": f"k{k}", "k": k, "steps": steps, "rollouts": rollouts, "train": train})
        # A registered model comes with its last student alone. An untrained student takes as many FLOPs as the missing one.
        previous = have[k] if k in have else local.untrained(k, previous)
    total = sum(s["rollouts"] + s["train"] for s in stages if s["name"] != "teacher")
    return {"stages": stages, "flops": total, "decoding": _decoding_flops(subject)}


def _teacher_flops(subject: Subject, train: TrainConfig) -> dict[str, Any]:
    store = TokenStore(subject.train, subject.run.seed)

    def micro(step: int, steps: int) -> list[TokenBatch]:
        rows = store.read(StepPlan(train.micro_batch, 1, 1, 0, 1).positions(0))
        return [TokenBatch(tokens_of(rows, pick_device()))]

    flops = count_step(ARStep(load_ar(subject.teacher)), micro).train * train.batch / train.micro_batch
    return {"name": "teacher", "k": 0, "steps": train.steps, "rollouts": 0.0, "train": train.steps * flops}


def _decoding_flops(subject: Subject) -> list[dict[str, Any]]:
    context = subject.run.corpus.data.block - subject.last.k
    backbone = load_ar(subject.teacher)
    ar = predicted_ar_step(backbone).flops + attention_step(backbone, 1, context).flops
    decoding = [{"name": "AR", "k": 1, "flops_a_token": ar}]
    for student, k in subject.pairs:
        model = PushForwardLM.from_pretrained(student.path)
        decoding.append({"name": student.name, "k": k, "flops_a_token": measured_step(model, k, context).flops / k})
    return decoding
