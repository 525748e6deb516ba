"""The command line, and every check that can be made before a cluster starts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pipelines.config.recipes import RECIPES, recipe
from pipelines.config.schema import Config, ConfigError, TrainConfig, apply, describe_fields, load_file, node_selector
from pipelines.config.stages import StageSpec, corpus_spec, resolve
from pipelines.data.corpus import check_source, is_remote
from pipelines.data.tokenise import eos_id, load_tokenizer
from pipelines.runs.cluster import with_lasting_root
from pipelines.runs.stages import claim


def read_command_line(description: str, words: list[str] | None = None, defaults: Sequence[str] = ()) -> Config:
    """`[--recipe NAME | --config FILE] [section.field=value …]` → a validated config. Raises ConfigError.

    `defaults` are overrides that come before the file and the words.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"recipes: {', '.join(RECIPES)}\n\nfields:\n{describe_fields()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help="starting point (default: quickstart)")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with `recipe` and sections of fields")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(words)
    tree = load_file(options.config) if options.config else {}
    named = tree.pop("recipe", None)
    start = apply(recipe(options.recipe or named or "quickstart"), {}, defaults)
    config = with_lasting_root(apply(start, tree, options.overrides))
    # A recipe's exceptions for stages that this run does not train are not the user's mistake.
    learning = [f"k{k}" for k in config.ks() if config.student.design.learns(k)]
    kept = {n: s for n, s in config.stages.items() if n in learning or s != start.stages.get(n)}
    config = dataclasses.replace(config, stages=kept)
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise ConfigError for anything that cannot work, with the value, the reason and the remedy."""
    claim(config.root, config.recipe)
    try:
        config.student.design.check()
    except ValueError as error:
        raise ConfigError(f"student.design: {error}") from None
    k = config.student.k
    if k < 1 or k & (k - 1):
        raise ConfigError(
            f"student.k={k} is not reachable by doubling from 1 (each stage's teacher makes two passes); choose 1, 2, 4, 8 …"
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
    if config.teacher.path is None:
        _check_train("teacher.train", config.teacher.train)
    for spec in resolve(config):
        if spec.learns:
            _check_stage(spec, config.data.block)
    _check_data(config)
    _check_teacher(config)


def _check_stage(spec: StageSpec, block: int) -> None:
    _check_train(f"{spec.name}: train", spec.train)
    check_targets(spec)
    rollout = spec.rollout
    if not 1 <= rollout.windows <= block:
        raise ConfigError(
            f"rollout.windows={rollout.windows}: a block of data.block={block} tokens has 1 to {block} windows"
        )
    node_selector(rollout.label)
    for field in ("actors", "batch", "cache_epochs", "steps_per_chunk", "draws"):
        if getattr(rollout, field) is not None:
            _check_positive(f"rollout.{field}", getattr(rollout, field))


def _check_choices(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value}: choose one of {', '.join(map(str, choices))}")


def _check_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{name}={value} must be positive")


def _check_train(section: str, train: TrainConfig) -> None:
    _check_choices(f"{section}.zero_stage", train.zero_stage, (1, 2, 3))
    _check_choices(f"{section}.precision", train.precision, ("fp32", "bf16"))
    _check_choices(f"{section}.schedule", train.schedule, ("constant", "cosine"))
    node_selector(train.label)
    _check_choices(f"{section}.warm_start", train.warm_start, ("previous", "teacher"))
    for field in ("steps", "batch", "micro_batch", "lr", "workers", "checkpoint_every", "log_every", "loss_chunk"):
        _check_positive(f"{section}.{field}", getattr(train, field))
    if not 0 <= train.ema < 1:
        raise ConfigError(f"{section}.ema={train.ema}: the decay must be in [0, 1); 0 switches the average off")
    if train.batch % (train.workers * train.micro_batch):
        raise ConfigError(
            f"{section}.batch={train.batch} cannot be dealt to {train.workers} ZeRO workers in micro-batches of "
            f"{train.micro_batch}: batch must be a multiple of workers × micro_batch = {train.workers * train.micro_batch}"
        )


def check_targets(stage: StageSpec) -> None:
    """Targets, labels and loss of a stage that learns must fit each other and the student's read-out."""
    name = stage.name
    _check_choices(f"{name}: targets", stage.targets, ("self", "ar"))
    _check_choices(f"{name}: loss", stage.loss, ("hard", "soft"))
    design, train, top_m = stage.design, stage.train, stage.rollout.top_m
    if top_m is not None:
        _check_positive(f"{name}: rollout.top_m", top_m)
    for field in ("own_windows", "own_from"):
        if not 0 <= getattr(train, field) <= 1:
            raise ConfigError(f"{name}: train.{field}={getattr(train, field)} is a share: give 0 to 1")
    local = stage.loss == "soft" and top_m is None
    if stage.loss == "soft" and not design.conditional:
        raise ConfigError(
            f"{name}: loss=soft with student.design.readout={design.readout}: its logits are a function of the noise, not a "
            "distribution to bring near the teacher's; use loss=hard, or student.design.readout=sequential"
        )
    if local and not design.exact_trunk:
        raise ConfigError(
            f"{name}: rollout.top_m=none takes labels from the AR model inside the student, which "
            "student.design.sequential.freeze_trunk=false trains away; give rollout.top_m, for example 32"
        )
    if stage.loss == "soft" and not local and stage.targets == "self":
        raise ConfigError(
            f"{name}: targets=self has no AR teacher on the rollout actors to make rollout.top_m={top_m} labels; "
            "use targets=ar, or rollout.top_m=none"
        )
    temperatures = design.noise.temperature_min, design.noise.temperature_max
    if stage.loss == "hard" and design.conditional and temperatures != (1.0, 1.0):
        raise ConfigError(
            f"{name}: loss=hard with temperatures {temperatures[0]} to {temperatures[1]}: tokens drawn at another "
            "temperature would teach a sequential student other distributions; use loss=soft, or temperature 1"
        )
    if local and train.precision == "bf16":
        raise ConfigError(
            f"{name}: rollout.top_m=none with train.precision=bf16 would take labels from a rounded AR model; give "
            "rollout.top_m, for example 32"
        )
    if train.own_windows and design.sequential.shortlist and train.zero_stage == 3:
        raise ConfigError(
            f"{name}: train.own_windows with a shortlist reads rows of the LM head, which train.zero_stage=3 scatters; use "
            "zero_stage=1 or 2"
        )
    if train.own_windows and not local:
        raise ConfigError(
            f"{name}: train.own_windows={train.own_windows} needs labels for windows no rollout actor has seen: set "
            "loss=soft and rollout.top_m=none"
        )


def _check_data(config: Config) -> None:
    data = config.data
    check_source(data)
    if not 0 < data.heldout_fraction < 1:
        raise ConfigError(f"data.heldout_fraction={data.heldout_fraction} must lie between 0 and 1")
    for field in ("block", "docs_per_shard"):
        _check_positive(f"data.{field}", getattr(data, field))
    if data.max_docs is not None:
        _check_positive("data.max_docs", data.max_docs)
    for field in ("blocks", "windows", "bootstrap", "prompts", "prompt_tokens", "new_tokens", "batch", "actors"):
        _check_positive(f"eval.{field}", getattr(config.eval, field))
    if config.eval.windows > data.block:
        raise ConfigError(
            f"eval.windows={config.eval.windows}: a block of data.block={data.block} tokens has fewer windows"
        )
    if config.eval.prompt_tokens > data.block:
        raise ConfigError(f"eval.prompt_tokens={config.eval.prompt_tokens} exceeds data.block={data.block}")


def _check_teacher(config: Config) -> None:
    teacher = config.teacher
    if teacher.path is None:
        limits: tuple[int | None, int | None, int | None] = (teacher.max_positions, None, teacher.layers)
        if teacher.hidden % teacher.heads or teacher.hidden // teacher.heads % 2:
            raise ConfigError(
                f"teacher.hidden={teacher.hidden} must be an even multiple of teacher.heads={teacher.heads} (rotary halves)"
            )
    else:
        limits = _limits(teacher.path, teacher.gguf_file)
    positions, vocabulary, layers = limits
    if teacher.path is not None:
        _check_attention_window(config, teacher.path)
    wanted = config.student.design.sequential.hint_layers
    if config.student.design.conditional and layers is not None and wanted > layers:
        raise ConfigError(
            f"student.design.sequential.hint_layers={wanted}: the teacher has {layers} layers; choose 1 to {layers}, or 0 "
            "for all"
        )
    corpus = corpus_spec(config)
    path, gguf_file = corpus.given_tokenizer, corpus.gguf_file
    if path is not None:
        try:
            tokenizer = load_tokenizer(path, gguf_file)
        except Exception as error:
            raise ConfigError(
                f"no tokenizer in {path}: {_first_line(error)}; give one beside the teacher's weights or in tokenizer.path"
            ) from None
        eos_id(tokenizer)
        size = len(tokenizer)
        if vocabulary is not None and size > vocabulary:
            raise ConfigError(
                f"teacher.path={path}: its tokenizer has {size} tokens and its model {vocabulary}; ids beyond the model's "
                "vocabulary would be read out of bounds. Use the tokenizer the model was trained with"
            )
    elif config.tokenizer.vocab_size < 257:
        raise ConfigError(f"tokenizer.vocab_size={config.tokenizer.vocab_size}: 256 bytes and <|endoftext|> need 257")
    longest = config.data.block + config.student.k
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.block={config.data.block} + student.k={config.student.k} exceeds the teacher's {positions} positions; "
            "use shorter blocks"
        )
    decoded = config.eval.prompt_tokens + config.eval.new_tokens + config.student.k
    if positions is not None and decoded > positions:
        raise ConfigError(
            f"eval.prompt_tokens + eval.new_tokens + student.k = {decoded} exceeds the teacher's {positions} positions"
        )


def _check_attention_window(config: Config, path: str) -> None:
    """Blocks see their whole context: a backbone that attends to a shorter window would not be itself."""
    hf_config = AutoConfig.from_pretrained(path, **_gguf(config.teacher.gguf_file))
    window = getattr(hf_config, "sliding_window", None)
    if not window or getattr(hf_config, "use_sliding_window", True) is False:
        return
    needed = max(config.data.block, config.eval.prompt_tokens + config.eval.new_tokens) + config.student.k
    if window < needed:
        raise ConfigError(
            f"teacher.path={path}: some of its layers attend to the last {window} tokens only, and data.block, or prompt "
            f"and new tokens of eval, and student.k make {needed}; use shorter ones, or a model without a sliding window"
        )


def _gguf(file: str | None) -> dict[str, str]:
    return {"gguf_file": file} if file else {}


def _limits(path: str, gguf_file: str | None) -> tuple[int | None, int | None, int | None]:
    """(longest context, vocabulary, layers) of a Hugging Face model, from its config alone."""
    try:
        config = AutoConfig.from_pretrained(path, **_gguf(gguf_file))
    except Exception as error:
        kind = "folder" if Path(path).exists() or is_remote(path) or path.startswith((".", "/")) else "hub id"
        raise ConfigError(
            f"teacher.path={path}: no causal LM there ({kind}; {_first_line(error)}). Give a folder with config.json and "
            "weights, or a hub id this machine can reach"
        ) from None
    positions, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    return positions, vocabulary, getattr(config, "num_hidden_layers", None)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
