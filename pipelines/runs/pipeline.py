"""The steps of a run, each finished once: what `distill` calls in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from kforcing.device import peak_rss_mb
from kforcing.loading import load_tokenizer
from kforcing.remote import address
from pipelines.config.saved import save_config
from pipelines.config.schema import Config
from pipelines.config.stages import StageSpec, evaluation_fingerprint, resolve_run
from pipelines.data.encoding import eos_id
from pipelines.data.tokenise import Prepared, prepare
from pipelines.evaluation.exact_mode import ExactJob, measure_exact_mode
from pipelines.evaluation.heldout import EvalJob, SampleJob, evaluate_student, write_samples
from pipelines.failures import cause_of
from pipelines.files import read_json, write_json
from pipelines.log import log
from pipelines.rollouts.cache import cache_rollouts
from pipelines.runs.costs import balance_line, cost_of, student_cost, training_log
from pipelines.runs.finish import finish_stage
from pipelines.runs.report import print_table, write_report
from pipelines.runs.stages import Stage, StageError, open_stage
from pipelines.runs.teacher import copy_teacher
from pipelines.storage import lease_of
from pipelines.tracking.tracker import Tracker
from pipelines.training.initial_model import AR
from pipelines.training.job import TrainJob, stage_job
from pipelines.training.relay import Relay
from pipelines.training.worker import begin, fit


@dataclass(frozen=True)
class Model:
    """A finished model of the run."""

    name: str
    k: int
    folder: Path
    fingerprint: str
    figures: dict[str, Any]
    """Evaluation; empty for the teacher."""
    cost: dict[str, Any]


class Pipeline:
    """A run directory, with the config that it belongs to and its tracker; use as a context manager."""

    def __init__(self, config: Config):
        run = resolve_run(config)
        self.root, self.recipe, self.seed, self.eval = run.root, run.recipe, run.seed, run.eval
        self.corpus, self.teacher_stage, self.student_stages = run.corpus, run.teacher, run.students
        self.relay = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Relay).remote()
        save_config(config)
        self.tracker = Tracker(run, asdict(config), lambda: ray.get(self.relay.drain.remote()))
        self.models: list[Model] = []
        self.training: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self.tracker.finish("FAILED", cause_of(error).text)
        else:
            self.tracker.finish("FINISHED" if error is None else "KILLED")

    def prepare(self) -> Prepared:
        """Corpus and tokenizer."""
        prepared = prepare(self.corpus)
        self.tracker.begin(prepared)
        return prepared

    def teacher(self, prepared: Prepared) -> Model:
        """The AR model: copied from Hugging Face, or trained as the first stage."""
        spec = self.teacher_stage
        name = spec.fingerprint(prepared.id)
        stage = open_stage(self.root, spec.name, name)
        if stage.manifest:
            log.info("teacher  finished before, skipped")
        else:
            with self.tracker.stage(spec.name, name, spec.params()):
                if spec.train is None:
                    self._copy_teacher(stage)
                else:
                    self._train_teacher(stage, prepared)
                finish_stage(stage, prepared)
        records = self._records(stage)
        return self._made(Model(spec.name, 0, stage.folder, name, {}, cost_of(records)))

    def _copy_teacher(self, stage: Stage) -> None:
        spec, config = self.teacher_stage, self.teacher_stage.config
        log.info(f"teacher  copying {config.path} in float32")
        _in_a_task(spec.name, copy_teacher, *config.located(), address(stage.folder))

    def _train_teacher(self, stage: Stage, prepared: Prepared) -> None:
        spec, tokenizer = self.teacher_stage, load_tokenizer(prepared.tokenizer)
        init = AR(spec.config, len(tokenizer), eos_id(tokenizer), spec.seed)
        store, train = address(prepared.split("train")), spec.config.train
        self._train(TrainJob(spec.name, address(stage.folder), store, spec.seed, train, spec.rollout, None, init))

    def student(self, spec: StageSpec, prepared: Prepared, teacher: Model, previous: Model | None) -> Model:
        """The student of a stage, from that of the stage before: rollouts, training, evaluation, registration."""
        name = spec.fingerprint(prepared.id, teacher.fingerprint, previous.fingerprint if previous else None)
        stage = open_stage(self.root, spec.name, name)
        scores = open_stage(self.root / "eval", spec.name, evaluation_fingerprint(name, self.eval))
        if stage.manifest and scores.manifest:
            log.info(f"{spec.name}  finished before, skipped")
        else:
            with self.tracker.stage(spec.name, name, spec.params()):
                if not stage.manifest:
                    self._train_student(spec, stage, prepared, teacher, previous)
                    finish_stage(stage, prepared, teacher.folder)
                self._evaluate(spec, scores, prepared, teacher, stage)
        self.tracker.register(stage.folder, spec.k, name)
        cost = student_cost(self._records(stage), spec)
        if "balance" in cost:
            log.info(f"{spec.name}  {balance_line(cost)}")
        assert scores.manifest is not None
        return self._made(Model(spec.name, spec.k, stage.folder, name, scores.manifest["figures"], cost))

    def _train_student(
        self, spec: StageSpec, stage: Stage, prepared: Prepared, teacher: Model, previous: Model | None
    ) -> None:
        store, before = address(prepared.split("train")), address(previous.folder) if previous else None
        job = stage_job(spec, address(stage.folder), store, address(teacher.folder), before)
        if not spec.learns:
            log.info(f"{spec.name}  is the teacher itself: nothing to train")
            _in_a_task(spec.name, begin, job)
            return
        if spec.rollout.cache:
            assert job.rollout_job is not None
            store = cache_rollouts(stage, store, spec.seed, spec.train, spec.rollout, job.rollout_job)
            job = dataclasses.replace(job, store=store, rollout_job=None)
        self._train(job)

    def _train(self, job: TrainJob) -> None:
        log.info(f"{job.stage}  training {job.train.steps} steps")
        fit(dataclasses.replace(job, lease=lease_of(job.folder)), self.relay)

    def _evaluate(self, spec: StageSpec, scores: Stage, prepared: Prepared, teacher: Model, stage: Stage) -> None:
        windows = self.eval.windows
        log.info(f"{spec.name}  evaluating {self.eval.blocks * windows:,} held-out windows")
        job = EvalJob(address(teacher.folder), address(stage.folder), spec.k, windows, self.seed, self.eval.batch)
        figures = evaluate_student(scores, prepared, job, self.eval)
        flat = {"eval/block_match": figures["block_match"]["value"]}
        for name in ("match", "student_nll", "teacher_nll", "target_nll"):
            flat |= {f"eval/{name}_{j + 1}": figure["value"] for j, figure in enumerate(figures[name])}
        self.tracker.metrics(
            {name: value for name, value in flat.items() if value is not None}, spec.train.steps if spec.learns else 0
        )
        match = " ".join(f"{m['value']:.3f}" for m in figures["match"])
        log.info(f"{spec.name}  held-out match {match}  block match {figures['block_match']['value']:.3f}")

    def _records(self, stage: Stage) -> list[dict[str, Any]]:
        records = training_log(self.root, stage.name, stage.fingerprint)
        if records:
            self.training[stage.name] = records
        return records

    def _made(self, model: Model) -> Model:
        self.models.append(model)
        return model

    def report(self, prepared: Prepared, teacher: Model, seconds: float) -> Path:
        """Samples, `report.json`, `report.md`, plots; all of it also in MLflow."""
        log.info("report  continuing prompts")
        students = [m for m in self.models if m.k]
        heldout, tokenizer = address(prepared.split("heldout")), address(prepared.tokenizer)
        paths = {m.name: address(m.folder) for m in students}
        samples = write_samples(
            self.root, SampleJob(address(teacher.folder), paths, tokenizer, heldout, self.seed, self.eval)
        )
        last = self.student_stages[-1]
        exact = self._exact_mode(students[-1], heldout) if last.design.exact_trunk and last.k > 1 else None
        report = {
            "recipe": self.recipe,
            "seconds": round(seconds, 1),
            "driver_rss_mb": round(peak_rss_mb()),
            "corpus": prepared.facts(),
            "stages": [{"name": m.name, "k": m.k, "path": paths[m.name], **m.figures} for m in students],
            "costs": [{"name": m.name, **m.cost} for m in self.models if m.cost.get("steps")],
            "exact_mode": exact,
            "samples": samples,
            "mlflow": self.tracker.ui_command(),
        }
        path = write_report(self.root, report, self.training)
        for name in (path.name, "report.json", "samples.json", "match.png", "training.png"):
            self.tracker.artifact(self.root / name)
        print_table(report)
        return path

    def _exact_mode(self, student: Model, heldout: str) -> dict[str, Any]:
        """The figures of exact mode, measured once and kept beside the student's other figures."""
        kept = self.root / "eval" / student.name / "exact_mode.json"
        if found := read_json(kept):
            return found
        log.info("report  comparing exact mode with the AR model")
        job = ExactJob(address(student.folder), heldout, self.seed, self.eval)
        task = ray.remote(num_cpus=self.eval.cpus_per_actor, num_gpus=self.eval.gpus_per_actor)(measure_exact_mode)
        figures = {"student": student.name, **ray.get(task.remote(job))}
        steps = {f"exact/tokens_a_step_T{t}": value for t, value in figures["tokens_a_step"].items()}
        self.tracker.metrics(steps | {f"exact/speed_batch{n}": value for n, value in figures["speed"].items()}, 0)
        write_json(kept, figures)
        return figures


def _in_a_task(stage: str, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function as a task on one CPU of the cluster. Raises StageError with its error in one line."""
    try:
        ray.get(ray.remote(num_cpus=1)(function).remote(*arguments))
    except RayTaskError as error:
        cause = cause_of(error)
        raise StageError(f"stage {stage}: {cause.text}", cause.exit_code) from error
