"""The steps of a run, each finished once: what `distill` calls in order."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from kforcing.backbone import build_backbone
from kforcing.attention.reader import check_backbone
from pipelines.config.schema import Config
from pipelines.config.fingerprint import fingerprint
from pipelines.evaluation.heldout import EvalJob, SampleJob, evaluate_student, write_samples
from pipelines.data.tokenise import Prepared, eos_id, load_tokenizer, prepare
from pipelines.runs.report import balance, balance_line, ratio, training_log, write_report
from pipelines.rollouts.actor import RolloutJob
from pipelines.rollouts.cache import cache_rollouts
from kforcing.backbone import load_ar
from kforcing.device import peak_rss_mb
from pipelines.runs.stages import Stage, open_stage
from pipelines.tracking.tracker import Tracker
from pipelines.tracking.registry import model_files
from pipelines.training.initial_model import AR, Grown, Wrapped
from pipelines.training.progress import Relay
from pipelines.training.job import TrainJob
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


def say(line: str) -> None:
    """A line for the person who watches."""
    print(line, flush=True)


class Pipeline:
    """A run directory with its tracker; use as a context manager."""

    def __init__(self, config: Config):
        self.config = config
        self.root = config.root
        self.relay = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Relay).remote()
        self.tracker = Tracker(config, lambda: ray.get(self.relay.drain.remote()))
        self.models: list[Model] = []
        self.training: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.tracker.finish("FINISHED" if kind is None else "KILLED" if not issubclass(kind, Exception) else "FAILED")

    def prepare(self) -> Prepared:
        """Corpus and tokenizer."""
        prepared = prepare(self.config, say)
        self.tracker.begin(prepared)
        return prepared

    def teacher(self, prepared: Prepared) -> Model:
        """The AR model: copied from Hugging Face, or trained as the first stage."""
        config = self.config.teacher
        source = _model_digest(config.path) if config.path else None
        # What trains a teacher from scratch does not name a given one.
        name = fingerprint(prepared.id, self.config.seed, source or config)
        stage = open_stage(self.root, "teacher", name)
        if stage.manifest:
            say("teacher  finished before, skipped")
        else:
            with self.tracker.stage("teacher", name, {"k": 0, **dataclasses.asdict(config)}):
                if config.path:
                    self._copy_teacher(stage)
                else:
                    self._train(stage, self._teacher_job(stage, prepared))
                self._finish(stage, prepared)
        return self._model(stage, 0, {})

    def _copy_teacher(self, stage: Stage) -> None:
        config = self.config.teacher
        say(f"teacher  copying {config.path} in float32")
        extra = {"gguf_file": config.gguf_file} if config.gguf_file else {}
        ray.get(ray.remote(num_cpus=1)(copy_teacher).remote(config.path, extra, str(stage.folder)))

    def _teacher_job(self, stage: Stage, prepared: Prepared) -> TrainJob:
        tokenizer = load_tokenizer(prepared.tokenizer)
        init = AR(self.config.teacher, len(tokenizer), eos_id(tokenizer), self.config.seed)
        store = str(prepared.split("train"))
        train, rollout = self.config.teacher.train, self.config.rollout
        return TrainJob("teacher", str(stage.folder), store, self.config.seed, train, rollout, None, init)

    def student(self, k: int, prepared: Prepared, teacher: Model, previous: Model | None) -> Model:
        """PFLM(k), from the stage before it: rollouts, training, evaluation, registration."""
        config = self.config.stage(f"k{k}")
        upstream = [teacher.fingerprint, previous.fingerprint if previous else None]
        name = fingerprint(prepared.id, config.seed, upstream, *_effective(k, config))
        stage = open_stage(self.root, f"k{k}", name)
        measured = [config.eval.blocks, config.eval.windows, config.eval.bootstrap]
        scores = open_stage(self.root / "eval", f"k{k}", fingerprint(name, measured))
        if stage.manifest and scores.manifest:
            say(f"k{k}  finished before, skipped")
        else:
            train, rollout = dataclasses.asdict(config.train), dataclasses.asdict(config.rollout)
            design = dataclasses.asdict(config.student.design)
            params = {
                "k": k,
                "targets": config.targets,
                "loss": config.loss,
                "design": design,
                "train": train,
                "rollout": rollout,
            }
            with self.tracker.stage(f"k{k}", name, params):
                if not stage.manifest:
                    job = self._student_job(k, stage, config, prepared, teacher, previous)
                    if config.student.design.learns(k):
                        self._train(stage, job)
                    else:
                        say(f"{stage.name}  is the teacher itself: nothing to train")
                        ray.get(ray.remote(num_cpus=1)(begin).remote(job))
                    self._finish(stage, prepared)
                self._evaluate(k, scores, prepared, teacher, stage)
        self.tracker.register(stage.folder, k, name)
        assert scores.manifest is not None
        return self._model(stage, k, scores.manifest["figures"])

    def _student_job(
        self, k: int, stage: Stage, config: Config, prepared: Prepared, teacher: Model, previous: Model | None
    ) -> TrainJob:
        ar = previous is None or config.targets == "ar"
        init: Grown | Wrapped
        if previous is None or config.train.warm_start == "teacher":
            init = Wrapped(str(teacher.folder), k, config.student.design, config.loss, config.seed)
        else:
            init = Grown(str(previous.folder), k, config.loss)
        rolls_out = teacher if ar or previous is None else previous
        rollout_job = RolloutJob(
            str(rolls_out.folder),
            ar,
            k,
            config.rollout.windows,
            config.seed,
            stage.name,
            config.student.design,
            config.rollout.top_m if config.loss == "soft" else None,
            config.rollout.batch,
            threads=max(1, int(config.rollout.cpus_per_actor)),
            draws=config.rollout.draws,
        )
        store = str(prepared.split("train"))
        if config.rollout.cache and config.student.design.learns(k):
            store = cache_rollouts(stage, store, config.seed, config.train, config.rollout, rollout_job, say)
        job = None if config.rollout.cache else rollout_job
        return TrainJob(stage.name, str(stage.folder), store, config.seed, config.train, config.rollout, job, init)

    def _train(self, stage: Stage, job: TrainJob) -> None:
        say(f"{stage.name}  training {job.train.steps} steps")
        fit(job, self.relay)

    def _finish(self, stage: Stage, prepared: Prepared) -> None:
        load_tokenizer(prepared.tokenizer).save_pretrained(stage.folder)
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(stage.folder / "ray_train", ignore_errors=True)
        stage.finish(files=[f.name for f in model_files(stage.folder)], finished=time.time())

    def _evaluate(self, k: int, scores: Stage, prepared: Prepared, teacher: Model, stage: Stage) -> None:
        config = self.config.eval
        say(f"k{k}  evaluating {config.blocks * config.windows:,} held-out windows")
        job = EvalJob(str(teacher.folder), str(stage.folder), k, config.windows, self.config.seed, config.batch)
        figures = evaluate_student(scores, prepared, job, config)
        flat = {"eval/block_match": figures["block_match"]["value"]}
        for name in ("match", "student_nll", "teacher_nll", "target_nll"):
            flat |= {f"eval/{name}_{j + 1}": figure["value"] for j, figure in enumerate(figures[name])}
        learns = self.config.student.design.learns(k)
        self.tracker.metrics(flat, self.config.stage(f"k{k}").train.steps if learns else 0)
        match = " ".join(f"{m['value']:.3f}" for m in figures["match"])
        say(f"k{k}  held-out match {match}  block match {figures['block_match']['value']:.3f}")

    def _model(self, stage: Stage, k: int, figures: dict[str, Any]) -> Model:
        records = training_log(self.root, stage.name, stage.fingerprint)
        cost = {"name": stage.name, **cost_of(records)}
        if records:
            self.training[stage.name] = records
        if "actors" in cost:
            step_s = cost["seconds"] * (1 - cost["data_wait"]) / cost["steps"]
            rows = self.config.stage(stage.name).train.batch
            cost["balance"] = balance(cost["rollout_s"], cost.pop("actors"), step_s, rows)
            say(f"{stage.name}  {balance_line(cost)}")
        model = Model(stage.name, k, stage.folder, stage.fingerprint, figures, cost)
        self.models.append(model)
        return model

    def report(self, prepared: Prepared, teacher: Model, seconds: float) -> Path:
        """Samples, `report.json`, `report.md`, plots; all of it also in MLflow."""
        say("report  continuing prompts")
        students = [m for m in self.models if m.k]
        heldout, tokenizer = str(prepared.split("heldout")), str(prepared.tokenizer)
        paths = {m.name: str(m.folder) for m in students}
        samples = write_samples(
            self.root, SampleJob(str(teacher.folder), paths, tokenizer, heldout, self.config.seed, self.config.eval)
        )
        report = {
            "recipe": self.config.recipe,
            "seconds": round(seconds, 1),
            "driver_rss_mb": round(peak_rss_mb()),
            "corpus": prepared.facts(),
            "stages": [{"name": m.name, "k": m.k, "path": str(m.folder), **m.figures} for m in students],
            "costs": [m.cost for m in self.models if m.cost.get("steps")],
            "samples": samples,
            "mlflow": self.tracker.ui_command(),
        }
        path = write_report(self.root, report, self.training)
        for name in (path.name, "report.json", "samples.json", "match.png", "training.png"):
            self.tracker.artifact(self.root / name)
        print_table(report)
        return path


def _effective(k: int, config: Config) -> list[Any]:
    """A stage's settings without those that have no effect on it.

    Each read-out has parts of its own; a stage with nothing to learn has no training; the first one has one possible
    teacher and one possible start; only cached rollouts have epochs, only a soft loss has labels,
    only own windows begin somewhere.
    """
    design = config.student.design.effective()
    if not design.learns(k):
        return [design]
    first, rollout, train = k == 1, config.rollout, config.train
    train = dataclasses.replace(train, warm_start="teacher") if first else train
    train = train if train.own_windows else dataclasses.replace(train, own_from=0.0)
    rollout = rollout if rollout.cache else dataclasses.replace(rollout, cache_epochs=0)
    rollout = rollout if config.loss == "soft" else dataclasses.replace(rollout, top_m=None)
    return [design, train, rollout, "ar" if first else config.targets, config.loss]


def print_table(report: dict[str, Any]) -> None:
    """The result on the terminal."""
    say(f"\n{'student':<9}{'match by offset':<28}{'block match [95%]':<26}teacher NLL of student's tokens / its own")
    for s in report["stages"]:
        match = " ".join(f"{m['value']:.3f}" for m in s["match"])
        nll = " ".join(
            f"{a['value']:.2f}/{b['value']:.2f}" for a, b in zip(s["student_nll"], s["teacher_nll"], strict=True)
        )
        say(f"{s['name']:<9}{match:<28}{ratio(s['block_match']):<26}{nll}")
    say(f"\nMLflow  {report['mlflow']}")


def cost_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps, seconds and medians of a stage's training records."""
    if not records:
        return {}
    cost = {
        "steps": records[-1]["step"],
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records),
        "data_wait": sum(r["data_wait"] * r["seconds"] for r in records) / sum(r["seconds"] for r in records),
    }
    if "actors" in records[-1]:  # rolled out while training, by as many as there were then
        cost["actors"] = records[-1]["actors"]
    if seconds := [r["rollout_s"] for r in records if "rollout_s" in r]:
        cost["rollout_s"] = statistics.median(seconds)
    for name in ("train_rss_mb", "train_gpu_mb", "rollout_rss_mb", "rollout_gpu_mb"):
        if peaks := [r[name] for r in records if name in r]:
            cost[name] = max(peaks)
    return cost


def copy_teacher(path: str, extra: dict[str, str], folder: str) -> None:
    """Load a Hugging Face causal LM, check that its head can be shared, and write it to the stage's folder."""
    backbone = load_ar(path, **extra)
    check_backbone(backbone)
    if extra:  # transformers does not save a model it has dequantised: move the weights to a plain one
        record = backbone.config.to_dict()
        record.pop("quantization_config", None)
        plain = build_backbone(record).float()
        plain.load_state_dict(backbone.state_dict())
        backbone = plain
    backbone.save_pretrained(folder)


def _model_digest(path: str) -> dict[str, Any]:
    """What names a given teacher: the config's contents and the weights' sizes and times; the id for a hub model."""
    folder = Path(path)
    if not folder.is_dir():
        return {"id": path}
    weights = sorted(f for pattern in ("*.safetensors", "*.gguf", "*.bin") for f in folder.glob(pattern))
    config = folder / "config.json"
    return {
        "config": hashlib.blake2b(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights],
    }
