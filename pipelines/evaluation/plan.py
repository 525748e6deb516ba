"""The parts of an evaluation and what each needs.

cost ─► train-METHOD ─┐
references ───────────┴─► row-… ─┬─► gen-ppl-1, gen-ppl-2, mauve, judge
     └─► frontier                └─► speed (alone, last)
joint-…, free-…, determinism-…
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import AutoConfig

from kforcing.configuration import PushForwardConfig
from kforcing.metrics.gen_ppl import SMOLLM2, check_external
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.evaluation import measure
from pipelines.evaluation.baselines import METHODS, STAGED, Row, Trial, method_config, rows_of, train_rival
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.determinism import determinism
from pipelines.evaluation.measure import Job, slug
from pipelines.evaluation.parts import Part
from pipelines.evaluation.subject import Student, Subject, block_sizes
from pipelines.files import write_json


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
    methods, text, k = methods_of(config), config.text, run.student.k
    if (run.root / "teacher" / "config.json").is_file():
        _check_positions(run.root / "teacher", config, k)
    if config.fidelity.windows > run.data.block:
        raise ConfigError(
            f"fidelity.windows={config.fidelity.windows}: held-out blocks have data.block={run.data.block} tokens; ask for "
            "fewer windows of a block"
        )
    if text.prompt_tokens > run.data.block:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens}: held-out blocks have data.block={run.data.block} tokens"
        )
    if methods and text.prompt_tokens <= k:
        raise ConfigError(f"text.prompt_tokens={text.prompt_tokens} must be more than k={k} for the rivals that verify")
    if methods and k < 2:
        raise ConfigError("rivals emit several tokens a pass, this run's last student has k=1; use rivals.only=off")
    if text.external:
        try:
            check_external(text.external)
        except (ValueError, OSError) as error:
            offline = "" if text.external == SMOLLM2 else f"; offline, use text.external={SMOLLM2}"
            raise ConfigError(f"text.external={text.external}: {str(error).splitlines()[0]}{offline}") from None

    def parts(subject: Subject) -> list[Part]:
        _check_positions(Path(subject.teacher), config, k)  # a registered model comes with its teacher
        return parts_of(subject, config, methods)

    return parts


def _check_positions(teacher: Path, config: EvaluationConfig, k: int) -> None:
    """Raise ConfigError for texts that are longer than an AR model's positions."""
    text, positions = config.text, getattr(AutoConfig.from_pretrained(teacher), "max_position_embeddings", None)
    needed = text.prompt_tokens + text.new_tokens + k + 1
    if positions is not None and needed > positions:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens} + text.new_tokens={text.new_tokens} + k + 1 = {needed} exceeds the "
            f"model's {positions} positions; ask for fewer"
        )


def parts_of(subject: Subject, config: EvaluationConfig, methods: list[str]) -> list[Part]:
    """All parts, in the order in which they are best begun. Each is named by the settings that it reads, and no others."""
    run, last = subject.config, subject.last
    couplings = {name: method_config(name, run, last.k, config.seed).student.design.coupling for name in STAGED}
    rows = rows_of(methods, _students(subject), last.k, block_sizes(last.k), couplings)
    write_json(Path(subject.root) / "rows.json", [asdict(row) for row in rows])
    job, base = Job(subject, config), (subject.id, config.seed)
    text, fidelity = config.text, config.fidelity
    texts = (*base, text.prompts, text.prompt_tokens, text.new_tokens, text.cut_at_eos, config.bootstrap)
    joint = (fidelity.contexts, fidelity.samples, fidelity.buckets)
    # What takes time, or rounds, is measured again where the driver has other cores, or tasks have GPUs.
    machine = (os.cpu_count(), platform.machine(), config.gpus)
    parts = [
        Part("cost", base, measure.cost, job),
        Part("references", (*texts, *joint, text.mauve_seeds), measure.references, job),
    ]
    for name in methods:
        trial = Trial(name, run, subject.teacher, subject.train, last.k, config.seed, config.rivals.share)
        parts.append(Part(f"train-{name}", (*base, name, config.rivals.share), train_rival, trial, ("cost",)))
    for row in rows:
        needs = ("references", f"train-{row.method}") if row.method else ("references",)
        parts.append(Part(f"row-{slug(row.name)}", (row,), measure.row, dataclasses.replace(job, row=row), needs))
    for student, k in subject.pairs:
        one = dataclasses.replace(job, student=student, k=k)
        far = fidelity.free_prompts, fidelity.free_tokens, text.prompt_tokens
        parts.append(Part(f"joint-{student.name}-at-{k}", (*base, config.bootstrap, *joint, k), measure.joint, one))
        parts.append(Part(f"free-{student.name}-at-{k}", (*base, config.bootstrap, *far, k), measure.free, one))
    two: list[tuple[Student | None, int]] = [(None, 1), (last, last.k)]
    for model, k in two:
        one, name = dataclasses.replace(job, student=model, k=k), model.name if model else "ar"
        parts.append(Part(f"determinism-{name}", (*texts, *machine), determinism, one))
    parts += _readers(config, rows, job)
    names = tuple(f"row-{slug(row.name)}" for row in rows)
    timed = (config.speed.batches, config.speed.rounds, *machine)
    parts.append(Part("speed", timed, measure.speed, job, names, alone=True))
    return parts


def _readers(config: EvaluationConfig, rows: list[Row], job: Job) -> list[Part]:
    """Parts in which another model reads the texts."""
    text, parts = config.text, []

    def part(name: str, inputs: tuple, run: Callable, some: list[Row], more: tuple[str, ...] = ()) -> Part:
        one = dataclasses.replace(job, rows=tuple(row.name for row in some) + more)
        return Part(name, inputs, run, one, ("references", *(f"row-{slug(row.name)}" for row in some)))

    if text.external:
        half, external = -(-len(rows) // 2), (text.external,)
        parts.append(part("gen-ppl-1", external, measure.external, rows[:half], ("AR again",)))
        parts.append(part("gen-ppl-2", external, measure.external, rows[half:]))
        parts.append(part("frontier", (*external, text.temperatures), measure.frontier, []))
        if text.mauve_seeds:
            own = [row for row in rows if row.path or row.decoder == "ar"]
            parts.append(part("mauve", (*external, text.mauve_seeds), measure.text_distance, own))
    if config.judge.url:
        some = [row for row in rows if row.decoder != "transformers"]
        parts.append(part("judge", (config.judge.model, config.judge.max_tokens), measure.judged, some))
    return parts


def _students(subject: Subject) -> list[tuple[str, str, int, str]]:
    return [
        (student.name, student.path, k, PushForwardConfig.from_pretrained(student.path).design.coupling)
        for student, k in subject.pairs
    ]
