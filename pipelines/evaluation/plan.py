"""The parts of an evaluation and what each needs.

cost ─► train-METHOD ─┐
references ───────────┴─► row-… ─┬─► gen-ppl-1, gen-ppl-2, mauve, judge
     └─► frontier                └─► speed (alone, last)
joint-…, free-…, determinism-…
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from kforcing.model import read_config
from pipelines.config import Config, ConfigError
from pipelines.evaluation import measure
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.determinism import determinism
from pipelines.evaluation.measure import Job, slug
from pipelines.evaluation.parts import Part
from pipelines.evaluation.rivals import METHODS, Row, Trial, rows_of, train_rival
from pipelines.evaluation.subject import Student, Subject, block_sizes
from pipelines.stages import write_json


def methods_of(config: EvaluationConfig) -> list[str]:
    """The methods to train. Raises ConfigError for an unknown one."""
    only = config.rivals.only
    if only is None:
        return list(METHODS)
    chosen = [] if only == "off" else only.split(",")
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(f"rivals.only={only}: the methods are {', '.join(METHODS)}")
    return chosen


def plan_of(run: Config, config: EvaluationConfig) -> Callable[[Subject], list[Part]]:
    """Check an evaluation against the run's config before anything starts; returns what makes its parts."""
    methods, text = methods_of(config), config.text
    positions = run.teacher.max_positions if run.teacher.path is None else None
    longest = text.prompt_tokens + text.new_tokens * (run.student.k + 1)
    if positions is not None and text.prompt_tokens + text.new_tokens + run.student.k > positions:
        raise ConfigError(
            f"text.prompt_tokens + text.new_tokens + k = {text.prompt_tokens + text.new_tokens + run.student.k} exceeds the "
            f"model's {positions} positions"
        )
    if methods and positions is not None and longest > positions:
        raise ConfigError(
            f"rivals that verify run ahead by up to k tokens a pass: text.prompt_tokens + text.new_tokens · (k + 1) = "
            f"{longest} exceeds the model's {positions} positions; use a smaller text.new_tokens, or rivals.only=off"
        )
    if text.prompt_tokens > run.data.block:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens}: held-out blocks have data.block={run.data.block} tokens"
        )
    if methods and text.prompt_tokens <= run.student.k:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens} must be more than k={run.student.k} for the rivals that verify"
        )
    if methods and run.student.k < 2:
        raise ConfigError("rivals emit several tokens a pass, this run's last student has k=1; use rivals.only=off")
    return lambda subject: parts_of(subject, config, methods)


def parts_of(subject: Subject, config: EvaluationConfig, methods: list[str]) -> list[Part]:
    """All parts, in the order in which they are best begun."""
    rows = rows_of(methods, _students(subject), subject.last.k, block_sizes(subject.last.k))
    write_json(Path(subject.root) / "rows.json", [asdict(row) for row in rows])
    job, base = Job(subject, config), (subject.id, config.seed)
    text, fidelity = (*base, config.bootstrap, config.text), (*base, config.bootstrap, config.fidelity)
    # Another external LM changes no text.
    made = (*base, config.bootstrap, dataclasses.replace(config.text, external=None, temperatures="", mauve_seeds=0))
    parts = [
        Part("cost", base, measure.cost, job),
        Part("references", (*made, config.fidelity), measure.references, job),
    ]
    for name in methods:
        trial = Trial(
            name, subject.config, subject.teacher, subject.train, subject.last.k, config.seed, config.rivals.share
        )
        parts.append(Part(f"train-{name}", (*base, name, config.rivals.share), train_rival, trial, ("cost",)))
    for row in rows:
        needs = ("references", f"train-{row.method}") if row.method else ("references",)
        one = dataclasses.replace(job, row=row)
        parts.append(Part(f"row-{slug(row.name)}", (*made, config.fidelity, row), measure.row, one, needs))
    for student, k in subject.pairs:
        one = dataclasses.replace(job, student=student, k=k)
        parts.append(Part(f"joint-{student.name}-at-{k}", (*fidelity, k), measure.joint, one))
        parts.append(Part(f"free-{student.name}-at-{k}", (*fidelity, config.text.prompt_tokens, k), measure.free, one))
    two: list[tuple[Student | None, int]] = [(None, 1), (subject.last, subject.last.k)]
    for model, k in two:
        one, name = dataclasses.replace(job, student=model, k=k), model.name if model else "ar"
        parts.append(Part(f"determinism-{name}", made, determinism, one))
    parts += _judges(subject, config, rows, job, text)
    names = tuple(f"row-{slug(row.name)}" for row in rows)
    parts.append(Part("speed", (*base, config.speed, config.text), measure.speed, job, names, alone=True))
    return parts


def _judges(subject: Subject, config: EvaluationConfig, rows: list[Row], job: Job, text: tuple) -> list[Part]:
    """Parts in which another model reads the texts."""

    def part(name: str, run: Callable, some: list[Row], more: tuple[str, ...] = ()) -> Part:
        one = dataclasses.replace(job, rows=tuple(row.name for row in some) + more)
        needs = ("references", *(f"row-{slug(row.name)}" for row in some))
        return Part(name, (*text, config.judge), run, one, needs)

    parts = []
    own = [row for row in rows if row.path or row.name.startswith("K-Forcing")]
    if config.text.external:
        half = -(-len(rows) // 2)
        parts.append(part("gen-ppl-1", measure.external, rows[:half], ("AR again",)))
        parts.append(part("gen-ppl-2", measure.external, rows[half:]))
        parts.append(part("frontier", measure.frontier, []))
        if config.text.mauve_seeds:
            parts.append(part("mauve", measure.text_distance, [row for row in rows if row.path]))
    if config.judge.url:
        parts.append(part("judge", measure.judged, own))
    return parts


def _students(subject: Subject) -> list[tuple[str, str, int, str]]:
    return [(student.name, student.path, k, read_config(student.path).design.coupling) for student, k in subject.pairs]


def load_rows(root: Path) -> list[Row]:
    """The rows of an evaluation in order."""
    return [Row(**record) for record in json.loads((root / "rows.json").read_text())]
