"""What is evaluated: the models of a run directory or one model of the MLflow registry, with their corpus."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kforcing.configuration import PushForwardConfig
from kforcing.modeling import PushForwardLM
from pipelines.config.fingerprint import fingerprint
from pipelines.config.overrides import override
from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.saved import CONFIG_FILE, load_config
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.config.stages import RunSpec, resolve_run
from pipelines.data.tokenise import prepare
from pipelines.evaluation.config import EvaluationConfig
from pipelines.files import atomic_folder, content_digest, read_json, write_json
from pipelines.runs.cluster import with_lasting_root
from pipelines.tracking.pipeline_runs import made_by
from pipelines.tracking.registry import Registered, registered_student
from pipelines.tracking.tracker import LOG


@dataclass(frozen=True)
class Student:
    """A finished student of the run."""

    name: str
    k: int
    path: str


@dataclass(frozen=True)
class Subject:
    """Models and data, all as paths that every node can read."""

    name: str
    run: RunSpec
    """The run that made them."""
    teacher: str
    students: tuple[Student, ...]
    tokenizer: str
    train: str
    heldout: str
    root: str
    """Folder of the evaluation."""
    parent: str | None
    """MLflow run that the models come from."""
    tracking: str | None
    """URI of the MLflow server of that run; `off` when the run was not tracked, none when it is not known."""

    @property
    def last(self) -> Student:
        """The student of the largest k."""
        return max(self.students, key=lambda s: s.k)

    @property
    def pairs(self) -> list[tuple[Student, int]]:
        """Every student at its own k, and the last one also at the smaller numbers of tokens in `block_sizes`."""
        own = [(s, s.k) for s in self.students if s != self.last]
        return own + [(self.last, k) for k in block_sizes(self.last.k)]

    @property
    def id(self) -> str:
        """A fingerprint of the contents of models and data."""
        folders = [self.teacher, *(s.path for s in self.students), self.heldout]
        return fingerprint([_mark(Path(folder)) for folder in folders])


def block_sizes(k: int) -> list[int]:
    """The numbers of tokens a step that are measured: 1, 2, 3, 4, 8, … up to k."""
    return sorted({n for n in (1, 2, 3, *(2**i for i in range(2, 12)), k) if n <= k})


def _mark(folder: Path) -> Any:
    """What tells the contents of a folder: the fingerprint of its stage, else its weights."""
    if record := read_json(folder / "manifest.json"):
        return record.get("fingerprint") or folder.parent.name
    return [content_digest(file) for file in sorted(folder.glob("*.safetensors"))]


def open_subject(target: str, options: EvaluationConfig) -> tuple[RunSpec, Path]:
    """The run behind a run directory or `models:/…`, and the folder of the evaluation. Raises ConfigError."""
    if target.startswith("models:/"):
        found = registered_student(target, options.tracking.uri)
        name = re.sub(r"[^A-Za-z0-9]+", "-", target.removeprefix("models:/")).strip("-")
        root = lasting(options.output_dir or f"runs/evaluation-{name}")
        file = found.run_file(CONFIG_FILE, root)
        config = load_config(file) if file else config_of(found.params, target)
        place = root.parent / Path(config.output_dir or "run").name
        return resolve_run(dataclasses.replace(config, output_dir=str(place))), root
    if options.teacher:
        raise ConfigError(f"teacher={options.teacher}: {target} has an AR model of its own; leave teacher out")
    root = lasting(target)
    if not (root / LOG).is_file():
        raise ConfigError(
            f"{target} is not a run directory (no {LOG}); give one that pipelines/distill.py wrote, or models:/NAME@ALIAS"
        )
    saved = root / CONFIG_FILE
    config = load_config(saved) if saved.is_file() else config_of(_last_config(root / LOG), target)
    run = resolve_run(dataclasses.replace(config, output_dir=str(root)))
    stages = ("teacher", *(spec.name for spec in run.students))
    missing = [name for name in stages if read_json(root / name / "manifest.json") is None]
    if missing:
        raise ConfigError(
            f"{target}: {', '.join(missing)} not finished; run pipelines/distill.py output_dir={target} to its end"
        )
    return run, lasting(options.output_dir or str(root / "evaluation"))


def lasting(path: str) -> Path:
    """The absolute path. In a cluster job a relative path is below the home directory, as for runs."""
    return with_lasting_root(Config("", output_dir=path)).root


def subject_of(target: str, run: RunSpec, root: Path, options: EvaluationConfig) -> Subject:
    """Models and data of an opened target. A missing corpus is prepared, and a registered model is downloaded."""
    prepared = prepare(run.corpus)
    parent: str | None
    tracking: str | None
    if target.startswith("models:/"):
        found = registered_student(target, options.tracking.uri)
        student = _downloaded(found, root)
        students: tuple[Student, ...] = (student,)
        teacher = options.teacher or _teacher_inside(student, root)
        name, parent, tracking = target.removeprefix("models:/"), str(found.run), found.uri
    else:
        students = tuple(Student(spec.name, spec.k, str(run.root / spec.name)) for spec in run.students)
        teacher, name = str(run.root / "teacher"), run.root.name
        state = made_by(run.root)
        parent, tracking = state.get("parent"), state.get("uri", "off")
    stores = str(prepared.split("train")), str(prepared.split("heldout"))
    return Subject(name, run, teacher, students, str(prepared.tokenizer), *stores, str(root), parent, tracking)


def config_of(record: dict[str, str], target: str) -> Config:
    """The config of a run without `config.yaml`, which an earlier release made, from its fields as text.

    The run's log has them, and so have the parameters of its MLflow run. Raises ConfigError where they are not enough.
    """
    name = record.get("recipe", "")
    if name not in RECIPES:
        raise ConfigError(
            f"{target} has no {CONFIG_FILE} and recipe {name!r}, which this release does not know; run pipelines/distill.py "
            "once more with the settings of the run: it skips finished stages and writes the file"
        )
    config = dataclasses.replace(recipe(name), stages={})
    for path, value in record.items():
        if path in ("recipe", "time", "event", "run") or path.startswith("tracking."):
            continue
        try:
            config = override(config, path, value)
        except ConfigError as error:
            raise ConfigError(
                f"{target} has no {CONFIG_FILE}, and its log is not that of this release ({error}); run pipelines/distill.py "
                "once more with the settings of the run: it skips finished stages and writes the file"
            ) from None
    return config


def _last_config(log: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with open(log) as lines:
        for line in lines:
            if '"event": "config"' in line and line.endswith("}\n"):  # a killed run may have cut its last line
                with suppress(ValueError):  # a full disk may have cut a line in the middle of the log
                    found = json.loads(line)
    return found


def _downloaded(found: Registered, root: Path) -> Student:
    folder = root / "model"
    marker, version = folder / "version.json", {"name": found.name, "version": found.version}
    if read_json(marker) != version:
        for old in (folder, root / "teacher"):
            shutil.rmtree(old, ignore_errors=True)
        found.download(folder)
        write_json(marker, version)
    k = PushForwardConfig.from_pretrained(folder).k
    return Student(f"k{k}", k, str(folder))


def _teacher_inside(student: Student, root: Path) -> str:
    """The AR model of a student with an exact trunk, saved in a folder that transformers can load."""
    if not PushForwardConfig.from_pretrained(student.path).design.exact_trunk:
        raise ConfigError("teacher=none: this student does not hold its AR model; give teacher=FOLDER")
    folder = root / "teacher"
    if not (folder / "config.json").is_file():
        with torch.no_grad(), atomic_folder(folder) as partial:
            PushForwardLM.from_pretrained(student.path).backbone.save_pretrained(partial)
    return str(folder)
