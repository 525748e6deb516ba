"""Training jobs: a variant with a seed, trained in a process of one core until it has spent its FLOPs."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from kforcing.backbone import load_ar
from kforcing.modeling import PushForwardLM
from pipelines.benchmarks.comparison.figures import conditional_figures, joint_figures
from pipelines.benchmarks.comparison.variants import Options, TrainingJob, Variant, config_of
from pipelines.config.fingerprint import fingerprint
from pipelines.config.stages import resolve
from pipelines.files import read_json, write_json
from pipelines.log import log
from pipelines.training.single_process import LocalStudent


def student_of(job: TrainingJob) -> LocalStudent:
    """What trains a job's stages in this process."""
    return LocalStudent(job.stages, job.teacher, job.train, job.folder, job.variant.name)


def run_job(job: TrainingJob) -> dict[str, Any]:
    """Train a job's stages and measure each k."""
    torch.set_num_threads(1)
    file = Path(job.folder, "result.json")
    if result := read_json(file):
        return result
    student = student_of(job)
    teacher = load_ar(job.teacher)
    previous: Path | None = None
    result = {"variant": job.variant.name, "seed": job.seed, "k": {}}
    for k in (stage.k for stage in job.stages):
        fixed = student.stages[k].train.steps if not job.budgets else None
        cost = student.stage(k, fixed, job.budgets.get(k), previous)
        previous = Path(job.folder, f"k{k}")
        figures = {"cost": cost, "spent": student.spent}
        if k in job.variant.ks:
            model = PushForwardLM.from_pretrained(previous)
            figures |= conditional_figures(model, teacher, job, k) | joint_figures(model, job, k)
        result["k"][str(k)] = figures
    write_json(file, result)
    return result


def job_of(variant: Variant, seed: int, options: Options, common: dict[str, str], root: Path) -> TrainingJob:
    """A variant with a seed, on the common teacher and corpus."""
    config, teacher = config_of(variant, seed, options), common["teacher_id"]
    name = fingerprint(config, options.share, teacher, variant.early, options.samples)
    folder = root / "jobs" / f"{variant.name.replace(' ', '-').replace(':', '')}-s{seed}-{name}"
    samples = root / f"teacher-samples-{teacher}-{options.samples}.pt"
    stores = common["train"], common["heldout"]
    return TrainingJob(
        variant, tuple(resolve(config)), common["teacher"], *stores, str(folder), {}, str(samples), options.samples
    )


def budgets_of(job: TrainingJob) -> dict[int, float]:
    """FLOPs that the paper's job will have spent up to each k, from one counted step of each stage."""
    torch.set_num_threads(1)
    spent, previous = {0: 0.0}, None
    with tempfile.TemporaryDirectory() as folder:
        student = student_of(dataclasses.replace(job, folder=folder))
        for k, spec in student.stages.items():
            flops = student.count(k, previous).total if spec.learns else 0.0
            previous = student.untrained(k, previous)
            spent[k] = max(spent.values()) + spec.train.steps * flops
    return spent


def with_budgets(job: TrainingJob, paper: dict[int, float]) -> TrainingJob:
    """The same job, to spend what the paper's recipe has spent at each k (k = 8 spends as much again as k = 4)."""
    spent = {**paper, 8: 2 * paper[4] - paper[2]}
    if job.variant.early is not None:
        spent[2] = job.variant.early * spent[4]
    return dataclasses.replace(job, budgets=spent)


def run_all(jobs: list[TrainingJob]) -> list[dict[str, Any]]:
    """All jobs as cluster tasks of one CPU, with a line for each that ends."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=1)(run_job)
    waiting = {task.remote(job): job for job in jobs}
    order, results = list(waiting), {}
    while waiting:
        done, _ = ray.wait(list(waiting))
        job = waiting.pop(done[0])
        results[done[0]] = ray.get(done[0])
        log.info(f"{job.variant.name}, seed {job.seed}: done, {len(waiting)} to go")
    return [results[ref] for ref in order]
