"""Every check of a config that can be made before a cluster starts and that concerns more than one field.

The range of a single field is part of its type, in `schema.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from kforcing.backbone import quantised, text_config
from kforcing.configuration import PushForwardConfig
from kforcing.design import Design
from kforcing.distillation.text import TEXT_LOSSES
from kforcing.engine.config import context_limit
from kforcing.families import GOOD, find_obstacle
from kforcing.loading import load_tokenizer
from kforcing.remote import fetch
from pipelines.config.overrides import leaves
from pipelines.config.schema import Config, TrainConfig
from pipelines.config.section import ConfigError, refuse_passwords
from pipelines.config.stages import StageSpec, corpus_spec, resolve
from pipelines.data.corpus import check_source
from pipelines.data.encoding import eos_id
from pipelines.data.listing import SELF, is_remote
from pipelines.runs.stages import claim


def validate(config: Config) -> None:
    """Raise ConfigError for anything that cannot work, with the value, the reason and the remedy."""
    refuse_passwords(leaves(dataclasses.asdict(config)))
    claim(config.root, config.recipe)
    try:
        config.student.design.check()
    except ValueError as error:
        raise ConfigError(f"student.design: {error}") from None
    k = config.student.k
    if config.targets != "text" and k & (k - 1):
        raise ConfigError(
            f"student.k={k} is not reachable by doubling from 1 (each stage's teacher makes two passes); choose 1, 2, 4, 8 …"
        )
    _check_exceptions(config)
    if config.teacher.path is None:
        _check_batch("teacher.train", config.teacher.train)
    for spec in resolve(config):
        if spec.learns:
            _check_stage(spec, config.data.block)
    if not is_remote(config.data.source):
        check_source(config.data)
    if config.data.source == SELF and (config.teacher.path is None or config.tokenizer.path):
        raise ConfigError(
            f"data.source=self with teacher.path={config.teacher.path}, tokenizer.path={config.tokenizer.path}: the text is "
            "written by a given AR model with its own tokenizer; set teacher.path alone, or another data.source"
        )
    if config.data.source == SELF and config.self_text.student:
        _check_writer(config.self_text.student)
    _check_lengths(config)
    _check_teacher(config)


def _check_writer(student: str) -> None:
    """Text may be written by a student whose exact mode has the AR model's draws. Actors compare the weights."""
    try:
        design = PushForwardConfig.from_pretrained(fetch(student, whole=False)).design
    except (ValueError, OSError) as error:
        raise ConfigError(f"self_text.student={student} is no student: {_first_line(error)}") from None
    if not design.exact_trunk or design.coupling != "gumbel":
        raise ConfigError(
            f"self_text.student={student} has readout={design.readout}, coupling={design.coupling}, freeze_trunk="
            f"{design.sequential.freeze_trunk}: only a sequential student with a frozen trunk and coupling=gumbel writes "
            "what the AR model writes; name another one, or leave it out"
        )


def _check_exceptions(config: Config) -> None:
    """Exceptions must belong to stages that this run trains, and cannot change which stages there are."""
    for name, own in config.stages.items():
        if "targets" in own and "text" in (config.targets, own["targets"]):
            raise ConfigError(
                f"stages.{name}.targets={own['targets']}: targets=text holds for a whole run, or for no stage"
            )
    known = [f"k{k}" for k in config.ks()]
    for name in config.stages:
        if name not in known:
            raise ConfigError(f"stages.{name}: this run has the stages {', '.join(known)}")
        if not config.student.design.learns(int(name[1:])):
            raise ConfigError(
                f"stages.{name}: with student.design.readout={config.student.design.readout} a student of one token a step "
                "is its teacher and trains nothing; leave it out"
            )


def _check_stage(spec: StageSpec, block: int) -> None:
    _check_batch(f"{spec.name}: train", spec.train)
    check_targets(spec)
    most = block - spec.k if spec.targets == "text" else block
    if spec.rollout.windows > most:
        raise ConfigError(
            f"rollout.windows={spec.rollout.windows}: a block of data.block={block} tokens has 1 to {most} windows"
        )


def _check_batch(section: str, train: TrainConfig) -> None:
    if train.batch % (train.workers * train.micro_batch):
        raise ConfigError(
            f"{section}.batch={train.batch} cannot be dealt to {train.workers} ZeRO workers in micro-batches of "
            f"{train.micro_batch}: batch must be a multiple of workers × micro_batch = {train.workers * train.micro_batch}"
        )
    if train.muon_lr and train.zero_stage == 3:
        raise ConfigError(
            f"{section}.muon_lr={train.muon_lr} needs whole matrices, which {section}.zero_stage=3 scatters; use "
            "zero_stage=1 or 2, or leave muon_lr out"
        )


def check_targets(stage: StageSpec) -> None:
    """Targets, labels and loss of a stage that learns must fit each other and the student's read-out."""
    if stage.targets == "text" or stage.loss in TEXT_LOSSES:
        _check_text(stage)
        return
    if stage.loss == "hard":
        _check_hard_loss(stage.name, stage.design)
    else:
        _check_soft_loss(stage)
    _check_on_policy(stage)


def _check_text(stage: StageSpec) -> None:
    """Text labels itself by the AR model that lies unchanged inside a sequential student."""
    name, design = stage.name, stage.design
    if stage.targets != "text" or stage.loss not in TEXT_LOSSES:
        raise ConfigError(
            f"{name}: targets={stage.targets} with loss={stage.loss}: targets=text goes with loss={', '.join(TEXT_LOSSES)}, "
            "the other targets with hard or soft"
        )
    if not design.exact_trunk:
        raise ConfigError(
            f"{name}: targets=text takes its labels from the AR model inside the student; use "
            "student.design.readout=sequential with student.design.sequential.freeze_trunk=true"
        )
    if stage.train.sampled_tokens and stage.train.zero_stage == 3:
        raise ConfigError(
            f"{name}: train.sampled_tokens={stage.train.sampled_tokens} reads rows of the LM head, which train.zero_stage=3 "
            "scatters; use zero_stage=1 or 2, or sampled_tokens=0"
        )
    unused = {"train.on_policy_fraction": stage.train.on_policy_fraction, "rollout.cache": stage.rollout.cache}
    for setting, value in unused.items():
        if value:
            raise ConfigError(f"{name}: {setting}={value} needs rollouts, and targets=text has none; leave it out")


def _check_hard_loss(name: str, design: Design) -> None:
    temperatures = design.noise.temperature_min, design.noise.temperature_max
    if design.conditional and temperatures != (1.0, 1.0):
        raise ConfigError(
            f"{name}: loss=hard with temperatures {temperatures[0]} to {temperatures[1]}: tokens drawn at another "
            "temperature would teach a sequential student other distributions; use loss=soft, or temperature 1"
        )


def _check_soft_loss(stage: StageSpec) -> None:
    """A soft loss needs a student whose logits are distributions, and an AR model that labels its targets."""
    name, design, top_k = stage.name, stage.design, stage.rollout.teacher_top_k
    if not design.conditional:
        raise ConfigError(
            f"{name}: loss=soft with student.design.readout={design.readout}: its logits are a function of the noise, not a "
            "distribution to bring near the teacher's; use loss=hard, or student.design.readout=sequential"
        )
    if top_k is None and not design.exact_trunk:
        raise ConfigError(
            f"{name}: rollout.teacher_top_k=none takes labels from the AR model inside the student, which "
            "student.design.sequential.freeze_trunk=false trains away; give rollout.teacher_top_k, for example 32"
        )
    if top_k is None and stage.train.precision == "bf16":
        raise ConfigError(
            f"{name}: rollout.teacher_top_k=none with train.precision=bf16 would take labels from a rounded AR model; give "
            "rollout.teacher_top_k, for example 32"
        )
    if top_k is not None and stage.targets == "self":
        raise ConfigError(
            f"{name}: targets=self has no AR teacher on the rollout actors to make rollout.teacher_top_k={top_k} labels; "
            "use targets=ar, or rollout.teacher_top_k=none"
        )


def _check_on_policy(stage: StageSpec) -> None:
    """Windows that the student itself rolls out need labels from the AR model inside it."""
    name, train = stage.name, stage.train
    if not train.on_policy_fraction:
        return
    if stage.design.sequential.shortlist and train.zero_stage == 3:
        raise ConfigError(
            f"{name}: train.on_policy_fraction with a shortlist reads rows of the LM head, which train.zero_stage=3 "
            "scatters; use zero_stage=1 or 2"
        )
    if stage.loss != "soft" or stage.rollout.teacher_top_k is not None:
        raise ConfigError(
            f"{name}: train.on_policy_fraction={train.on_policy_fraction} needs labels for windows no rollout actor has "
            "seen: set loss=soft and rollout.teacher_top_k=none"
        )


def _check_lengths(config: Config) -> None:
    """The windows and prompts of the evaluation must fit in a block."""
    block = config.data.block
    if config.eval.windows > block:
        raise ConfigError(f"eval.windows={config.eval.windows}: a block of data.block={block} tokens has fewer windows")
    if config.eval.prompt_tokens > block:
        raise ConfigError(f"eval.prompt_tokens={config.eval.prompt_tokens} exceeds data.block={block}")


def _check_teacher(config: Config) -> None:
    """The AR model must be there, be an architecture that works, hold the tokenizer's ids, and be long and deep enough."""
    teacher = config.teacher
    positions: int | None
    if teacher.path is None:
        if teacher.hidden % teacher.heads or teacher.hidden // teacher.heads % 2:
            raise ConfigError(
                f"teacher.hidden={teacher.hidden} must be an even multiple of teacher.heads={teacher.heads} (rotary halves)"
            )
        positions, vocabulary, layers = teacher.max_positions, None, teacher.layers
    else:
        try:
            hf_config = _given_config(*teacher.located())
        except ValueError as error:
            raise ConfigError(f"teacher.path={teacher.path}: {error}") from None
        _check_architecture(config, hf_config)
        decoder = text_config(hf_config)
        positions, vocabulary, layers = context_limit(decoder), decoder.vocab_size, decoder.num_hidden_layers
    wanted = config.student.design.sequential.hint_layers
    if config.student.design.conditional and wanted > layers:
        raise ConfigError(
            f"student.design.sequential.hint_layers={wanted}: the teacher has {layers} layers; choose 1 to {layers}, or 0 "
            "for all"
        )
    if positions is not None:
        _check_positions(config, positions)
    _check_tokenizer(config, vocabulary)


def _given_config(path: str, gguf_file: str | None) -> Any:
    """The config of a Hugging Face model. Raises ValueError when there is none."""
    try:
        return AutoConfig.from_pretrained(path, gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:
        kind = "folder" if Path(path).exists() or is_remote(path) or path.startswith((".", "/")) else "hub id"
        raise ValueError(
            f"no causal LM there ({kind}; {_first_line(error)}). Give a folder with config.json and weights, or a hub id "
            "this machine can reach"
        ) from None


def _check_architecture(config: Config, hf_config: Any) -> None:
    """A tiny random copy of the model must do all that a teacher and a backbone have to do."""
    k = max(config.student.k, 2)
    problem = quantised(hf_config) or find_obstacle(hf_config, config.student.design, k)
    if problem:
        raise ConfigError(
            f"teacher.path={config.teacher.path} ({hf_config.model_type}) cannot be a backbone: {problem}. Families "
            f"that work are {GOOD}; `python -m kforcing.families` tries all"
        )


def _check_tokenizer(config: Config, vocabulary: int | None) -> None:
    corpus = corpus_spec(config)
    path = corpus.given_tokenizer
    if path is None:
        if config.tokenizer.vocab_size < 257:
            raise ConfigError(
                f"tokenizer.vocab_size={config.tokenizer.vocab_size}: 256 bytes and <|endoftext|> need 257"
            )
        return
    try:
        tokenizer = load_tokenizer(path, corpus.gguf_file)
    except Exception as error:
        raise ConfigError(
            f"no tokenizer in {path} fits: {_first_line(error)}; give one beside the teacher's weights or in tokenizer.path"
        ) from None
    eos_id(tokenizer)
    size = len(tokenizer)
    if vocabulary is not None and size > vocabulary:
        raise ConfigError(
            f"teacher.path={path}: its tokenizer has {size} tokens and its model {vocabulary}; ids beyond the model's "
            "vocabulary would be read out of bounds. Use the tokenizer the model was trained with"
        )


def _check_positions(config: Config, positions: int) -> None:
    """Training, rollouts and evaluation must stay within the context up to which the model computes the same everywhere."""
    limit = f"the teacher's {positions} positions"
    if config.teacher.path is not None:
        limit += (
            " (the least of its longest context, its sliding window, and the length at which its rotary factors switch)"
        )
    if config.data.block + config.student.k > positions:
        raise ConfigError(
            f"data.block={config.data.block} + student.k={config.student.k} exceeds {limit}; use shorter blocks"
        )
    decoded = config.eval.prompt_tokens + config.eval.new_tokens + config.student.k
    if decoded > positions:
        raise ConfigError(f"eval.prompt_tokens + eval.new_tokens + student.k = {decoded} exceeds {limit}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
