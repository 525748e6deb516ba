"""The parts of an evaluation, and which results each of them needs.

cost ──► train-METHOD ─┐
references ────────────┴─► row-… ─┬─► gen-ppl-1, gen-ppl-2, mauve, judge
     └──► frontier                └─► speed (alone on the machine, last)
joint-…, free-…, determinism-…      need nothing
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
from kforcing.engine.config import context_limit
from kforcing.loading import SMOLLM2
from kforcing.metrics.external import check_external
from pipelines.config.section import ConfigError
from pipelines.config.stages import RunSpec
from pipelines.evaluation.baseline_training import BaselineTraining, method_design, train_baseline
from pipelines.evaluation.baselines import METHODS, STAGED, rows_of
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.decoders import MethodRow, slug
from pipelines.evaluation.measure.determinism import determinism
from pipelines.evaluation.measure.flops import training_and_decoding_flops
from pipelines.evaluation.measure.free_run import free_run_of_student
from pipelines.evaluation.measure.joint import joint_of_student
from pipelines.evaluation.measure.judgement import judged_rows
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.speed import speed
from pipelines.evaluation.measure.text import frontier, gen_ppl_of_rows, mauve_of_rows, references, row_figures
from pipelines.evaluation.parts import Part
from pipelines.evaluation.subject import Student, Subject, block_sizes
from pipelines.files import write_json


def plan_of(run: RunSpec, config: EvaluationConfig) -> Callable[[Subject], list[Part]]:
    """Check an evaluation against the run's config before anything starts. Returns the function that makes its parts.

    Raises ConfigError.
    """
    methods, text, k = methods_of(config), config.text, run.shared.k
    if (run.root / "teacher" / "config.json").is_file():
        _check_positions(run.root / "teacher", config, k)
    block = run.corpus.data.block
    if config.fidelity.windows > block:
        raise ConfigError(
            f"fidelity.windows={config.fidelity.windows}: held-out blocks have data.block={block} tokens; ask for "
            "fewer windows of a block"
        )
    if text.prompt_tokens > block:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens}: held-out blocks have data.block={block} tokens; ask for "
            "shorter prompts"
        )
    if methods and text.prompt_tokens <= k:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens} must be more than k={k}, because baselines that verify read the last "
            "k tokens of a prompt again"
        )
    if methods and k < 2:
        raise ConfigError(
            "baselines emit several tokens a pass, but the last student of this run has k=1; use baselines.only=off"
        )
    if text.external:
        _check_external(text.external)

    def parts(subject: Subject) -> list[Part]:
        _check_positions(Path(subject.teacher), config, k)  # again, since a registered model comes with its own teacher
        return parts_of(subject, config, methods)

    return parts


def methods_of(config: EvaluationConfig) -> list[str]:
    """The methods to train. Raises ConfigError for an unknown one."""
    only = config.baselines.only
    if only is None:
        return list(METHODS)
    chosen = [] if only == "off" else only.split(",")
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(
                f"baselines.only={only}: there is no method {name!r}; choose from {', '.join(METHODS)}, or off for none"
            )
    return chosen


def _check_positions(teacher: Path, config: EvaluationConfig, k: int) -> None:
    """Raise ConfigError for texts that are longer than what the engine reads as the AR model does."""
    text, positions = config.text, context_limit(AutoConfig.from_pretrained(teacher, trust_remote_code=False))
    needed = text.prompt_tokens + text.new_tokens + k + 1
    if positions is not None and needed > positions:
        raise ConfigError(
            f"text.prompt_tokens={text.prompt_tokens} + text.new_tokens={text.new_tokens} + k + 1 = {needed} exceeds the "
            f"model's {positions} positions; ask for fewer"
        )


def _check_external(name: str) -> None:
    try:
        check_external(name)
    except (ValueError, OSError) as error:
        offline = "" if name == SMOLLM2 else f"; offline, use text.external={SMOLLM2}"
        raise ConfigError(f"text.external={name}: {str(error).splitlines()[0]}{offline}") from None


def parts_of(subject: Subject, config: EvaluationConfig, methods: list[str]) -> list[Part]:
    """All parts, in the order in which they should start. Each is named by the settings that it reads and by no others."""
    last, shared, teacher = subject.last, subject.run.shared, subject.run.teacher.train
    designs = {name: method_design(name, shared.design) for name in STAGED}
    rows = rows_of(methods, _students(subject), last.k, block_sizes(last.k), designs, _exact(subject))
    write_json(Path(subject.root) / "rows.json", [asdict(row) for row in rows])
    measurement, base, text = Measurement(subject, config), (subject.id, config.seed), _text_settings(subject, config)
    parts = [
        Part("cost", base, training_and_decoding_flops, measurement),
        Part("references", (*text, *_joint_settings(config), config.text.mauve_seeds), references, measurement),
    ]
    share = config.baselines.share
    for name in methods:
        training = BaselineTraining(name, shared, teacher, subject.teacher, subject.train, last.k, config.seed, share)
        parts.append(Part(f"train-{name}", (*base, name, share), train_baseline, training, ("cost",)))
    for row in rows:
        needs = ("references", f"train-{row.method}") if row.method else ("references",)
        one = dataclasses.replace(measurement, row=row)
        parts.append(Part(f"row-{slug(row.name)}", (row,), row_figures, one, needs))
    parts += _student_parts(measurement)
    parts += _reader_parts(measurement, rows)
    timed = (config.speed.batches, config.speed.rounds, *_machine(config))
    names = tuple(f"row-{slug(row.name)}" for row in rows)
    parts.append(Part("speed", timed, speed, measurement, names, alone=True))
    return parts


def _text_settings(subject: Subject, config: EvaluationConfig) -> tuple:
    text = config.text
    lengths = (text.prompts, text.prompt_tokens, text.new_tokens, text.cut_at_eos)
    return (subject.id, config.seed, *lengths, config.bootstrap)


def _joint_settings(config: EvaluationConfig) -> tuple:
    return (config.fidelity.contexts, config.fidelity.samples, config.fidelity.buckets)


def _machine(config: EvaluationConfig) -> tuple:
    """Times and rounding errors are measured again where the driver has other cores, or tasks have GPUs."""
    return (os.cpu_count(), platform.machine(), config.gpus)


def _student_parts(measurement: Measurement) -> list[Part]:
    """Fidelity of every student at every k, and determinism of the AR model and the last student."""
    subject, config, parts = measurement.subject, measurement.config, []
    fidelity, base = config.fidelity, (subject.id, config.seed, config.bootstrap)
    far = (fidelity.free_prompts, fidelity.free_tokens, config.text.prompt_tokens)
    for student, k in subject.pairs:
        one, at = dataclasses.replace(measurement, student=student, k=k), f"{student.name}-at-{k}"
        parts.append(Part(f"joint-{at}", (*base, *_joint_settings(config), k), joint_of_student, one))
        parts.append(Part(f"free-{at}", (*base, *far, k), free_run_of_student, one))
    inputs = (*_text_settings(subject, config), *_machine(config))
    models: list[tuple[str, Student | None, int]] = [("ar", None, 1), (subject.last.name, subject.last, subject.last.k)]
    for name, model, k in models:
        one = dataclasses.replace(measurement, student=model, k=k)
        parts.append(Part(f"determinism-{name}", inputs, determinism, one))
    return parts


def _reader_parts(measurement: Measurement, rows: list[MethodRow]) -> list[Part]:
    """Parts in which another model reads the texts."""
    config, text, parts = measurement.config, measurement.config.text, []

    def part(name: str, inputs: tuple, run: Callable, some: list[MethodRow], more: tuple[str, ...] = ()) -> Part:
        one = dataclasses.replace(measurement, rows=tuple(row.name for row in some) + more)
        return Part(name, inputs, run, one, ("references", *(f"row-{slug(row.name)}" for row in some)))

    if text.external:
        half, external = -(-len(rows) // 2), (text.external,)
        parts.append(part("gen-ppl-1", external, gen_ppl_of_rows, rows[:half], ("AR again",)))
        parts.append(part("gen-ppl-2", external, gen_ppl_of_rows, rows[half:]))
        parts.append(part("frontier", (*external, text.temperatures), frontier, []))
        if text.mauve_seeds:
            own = [row for row in rows if row.path or row.decoder == "ar"]
            parts.append(part("mauve", (*external, text.mauve_seeds), mauve_of_rows, own))
    if config.judge.url:
        some = [row for row in rows if row.decoder != "transformers"]
        parts.append(part("judge", (config.judge.model, config.judge.max_tokens), judged_rows, some))
    return parts


def _students(subject: Subject) -> list[tuple[str, str, int, str]]:
    return [
        (student.name, student.path, k, PushForwardConfig.from_pretrained(student.path).design.coupling)
        for student, k in subject.pairs
    ]


def _exact(subject: Subject) -> tuple[str, str, int, str] | None:
    """The last student, if the AR model inside it can verify its tokens."""
    last, design = subject.last, PushForwardConfig.from_pretrained(subject.last.path).design
    return (last.name, last.path, last.k, design.coupling) if design.exact_trunk and last.k > 1 else None
