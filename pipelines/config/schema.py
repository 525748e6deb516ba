"""What a run can be told: frozen dataclasses, one docstring a field, `section.field=value` overrides.

A field marked ``metadata=RUNTIME`` says where or how visibly work runs, not what it computes; it stays out of the
hashes that name stages, so changing it never reruns anything.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kforcing.chunking import CHUNK
from kforcing.design import Design, NoiseConfig

RUNTIME = {"runtime": True}


class ConfigError(ValueError):
    """A mistake of the person who started the run; its text names the value and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """Corpus, split and packing."""

    source: str = "sotu"
    """`sotu` (ships with the project), a path or URI of Parquet, JSONL or text (file, folder or glob), or `hf:NAME`
    for a `datasets` name or local dataset folder."""
    hf_config: str | None = None
    """Second argument of `datasets.load_dataset` for `hf:` sources."""
    hf_split: str = "train"
    """Split of an `hf:` source."""
    hf_streaming: bool = True
    """Stream an `hf:` source instead of downloading it whole."""
    text_column: str = "text"
    """Column that holds a document's text."""
    id_column: str | None = None
    """Column that names a document; without one, the hash of its text does."""
    block: int = 64
    """Tokens in a packed block: the context length N of training."""
    heldout_fraction: float = 0.05
    """Share of documents, chosen by a hash of their id, kept out of training."""
    docs_per_shard: int = 32
    """Documents tokenised, packed and shuffled together into one Parquet shard."""
    max_docs: int | None = None
    """Read at most this many documents."""
    cache_dir: str | None = field(default=None, metadata=RUNTIME)
    """Where prepared corpora are kept and found again; by default `data/` beside the run directory."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer, when the teacher brings none: a given one, or a byte-level BPE trained on the train split."""

    path: str | None = None
    """Local directory or hub id of a tokenizer; none trains one."""
    vocab_size: int = 512
    """Vocabulary with the 256 bytes and `<|endoftext|>`."""
    sample_chars: int = 20_000_000
    """Characters of the train split the merges are learnt from."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one stage."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 16
    """Sequences in an optimiser step, over all workers."""
    micro_batch: int = 8
    """Sequences in one forward and backward of one worker; batch = workers × micro_batch × accumulation."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """`constant` or `cosine` (down to a tenth), after the warm-up."""
    warmup: int = 50
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.999
    """AdamW's second decay."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    ema: float = 0.999
    """Decay of the weights' moving average, which is what the stage exports; 0 exports the raw weights. The first
    steps use min(ema, (1 + step) / (10 + step))."""
    precision: str = "fp32"
    """`fp32` or `bf16`. DeepSpeed keeps fp32 master weights for bf16, but the moving average and the exported weights
    are taken from the bf16 copy."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1, 2 or 3."""
    own_windows: float = 0.0
    """Share of sequences, in the later part of a stage, whose windows the student itself rolls out; the AR model inside
    it scores them. Needs loss=soft, an exact trunk and rollout.top_m=none."""
    own_from: float = 0.5
    """Share of a stage's steps before that part begins."""
    warm_start: str = "previous"
    """Weights a student stage begins from: `previous` stage, or the AR `teacher`. (Continuing an interrupted stage is
    *resuming*: it always happens.)"""
    workers: int = field(default=2, metadata=RUNTIME)
    """Train workers, each one DeepSpeed rank."""
    cpus_per_worker: float = field(default=0.25, metadata=RUNTIME)
    """Ray CPUs a train worker reserves."""
    gpus_per_worker: float = field(default=0.0, metadata=RUNTIME)
    """Ray GPUs a train worker reserves."""
    label: str | None = field(default=None, metadata=RUNTIME)
    """`key=value` label of the nodes train workers may use."""
    loss_chunk: int = field(default=CHUNK, metadata=RUNTIME)
    """Tokens whose logits over the whole vocabulary exist at a time; their gradients are made at once. Under ZeRO 3 logits
    are computed again in the backward pass, and a head trained in bf16 sums its gradient with a rounding a chunk."""
    activation_checkpointing: bool = field(default=False, metadata=RUNTIME)
    """Keep only the inputs of transformer layers, and compute the rest again in the backward pass: less memory, about a
    third more time."""
    checkpoint_every: int = field(default=200, metadata=RUNTIME)
    """Steps between checkpoints an interrupted stage resumes from."""
    log_every: int = field(default=20, metadata=RUNTIME)
    """Steps between progress lines and metric points."""
    max_failures: int = field(default=2, metadata=RUNTIME)
    """How often Ray Train restarts a failed worker group from the last checkpoint."""


@dataclass(frozen=True)
class RolloutConfig:
    """Teacher rollouts of one stage."""

    windows: int = 32
    """Windows trained of each sequence's N."""
    draws: int = 1
    """Independent noises of each of those windows: a context is read once for all of them."""
    top_m: int | None = 32
    """For loss=soft: tokens of the teacher's distribution that travel with each target, with their log-probabilities;
    what is left is one tail. None ships tokens alone, and train workers take whole distributions from the AR model
    inside the student."""
    cache: bool = False
    """Write rollouts to Parquet once and train several epochs from them, instead of streaming fresh ones."""
    cache_epochs: int = 4
    """How many times cached rollouts are trained on."""
    batch: int | None = field(default=None, metadata=RUNTIME)
    """Sequences in one teacher forward, at most the rows of one call (those of a train worker in steps_per_chunk steps); none
    takes 16 on a CPU, and on a GPU as many as fit in half of its free memory. Then a retry may roll out in batches of another
    size, and a token that two candidates nearly tie for may differ; give a number where it must not."""
    actors: int = field(default=1, metadata=RUNTIME)
    """Rollout actors, each with its own copy of the teacher."""
    cpus_per_actor: float = field(default=0.5, metadata=RUNTIME)
    """Ray CPUs a rollout actor reserves."""
    gpus_per_actor: float = field(default=0.0, metadata=RUNTIME)
    """Ray GPUs a rollout actor reserves."""
    label: str | None = field(default=None, metadata=RUNTIME)
    """`key=value` label of the nodes rollout actors may use."""
    steps_per_chunk: int = field(default=4, metadata=RUNTIME)
    """Optimiser steps whose rows travel together from a rollout actor to a train worker."""


@dataclass(frozen=True)
class TeacherConfig:
    """The AR model: a Hugging Face causal LM, or a small Llama-style one trained as the first stage."""

    path: str | None = None
    """Local directory or hub id of a causal LM with its tokenizer; none trains one from scratch."""
    gguf_file: str | None = None
    """File inside `path` when the weights are GGUF (needs the `gguf` extra)."""
    hidden: int = 128
    """Width of the model trained from scratch."""
    layers: int = 3
    """Its layers."""
    heads: int = 4
    """Its attention heads."""
    mlp: int = 512
    """Its MLP width."""
    max_positions: int = 512
    """Its longest context."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=3e-3, batch=32, micro_batch=16))
    """Its training."""


@dataclass(frozen=True)
class StudentConfig:
    """The push-forward model."""

    k: int = 4
    """Tokens a pass at the end; stages double from 1."""
    design: Design = field(default_factory=lambda: Design(noise=NoiseConfig(min_cycles=0.25, max_cycles=32.0)))
    """Read-out and coupling."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out windows."""

    blocks: int = 256
    """Held-out blocks."""
    windows: int = 16
    """Windows of each block."""
    bootstrap: int = 1000
    """Resamples of documents behind each 95% interval."""
    prompts: int = 3
    """Prompts continued in the report."""
    prompt_tokens: int = 24
    """Tokens of each prompt."""
    new_tokens: int = 64
    """Tokens each model adds."""
    batch: int = field(default=16, metadata=RUNTIME)
    """Blocks in one forward."""
    actors: int = field(default=1, metadata=RUNTIME)
    """Evaluation actors."""
    cpus_per_actor: float = field(default=1.0, metadata=RUNTIME)
    """Ray CPUs an evaluation actor reserves."""
    gpus_per_actor: float = field(default=0.0, metadata=RUNTIME)
    """Ray GPUs an evaluation actor reserves."""


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = field(default=None, metadata=RUNTIME)
    """Tracking URI; default `MLFLOW_TRACKING_URI`, else sqlite `mlflow.db` beside the run directory; `off` disables."""
    experiment: str = field(default="kforcing", metadata=RUNTIME)
    """Experiment name."""
    model_name: str | None = field(default=None, metadata=RUNTIME)
    """Registered model that receives a version with alias `k1`, `k2`, … each; default `kforcing-<recipe>`."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    recipe: str
    """Name of the recipe it started from."""
    output_dir: str = field(default="", metadata=RUNTIME)
    """Run directory, on a file system every node sees; default `runs/<recipe>`."""
    seed: int = 0
    """Of initialisation, noise, anchors and data order."""
    targets: str = "self"
    """Who makes the targets of stages beyond the first: `self` (two passes of the previous student, the paper's
    self-forcing) or `ar` (the AR teacher's own coupled steps)."""
    loss: str = "hard"
    """`hard`: −log p of the target token; `soft`: KL divergence from the teacher's distribution given the rolled-out
    tokens before it (for read-outs whose logits are distributions)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """AR model."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """Push-forward model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollouts of every student stage."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of every student stage."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Exceptions for single stages: `stages.k4.train.steps=2000`, `stages.k2.targets=ar`."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    @property
    def relative_root(self) -> Path:
        """The run directory as it was given, or the default one."""
        return Path(self.output_dir or f"runs/{self.recipe}").expanduser()

    @property
    def root(self) -> Path:
        """The absolute run directory."""
        return self.relative_root.absolute()

    def ks(self) -> list[int]:
        """The doubling stages up to the student's k: 1, 2, 4, …"""
        return [2**i for i in range(self.student.k.bit_length())]

    def stage(self, name: str) -> Config:
        """This config with the stage's exceptions applied to `train`, `rollout`, `targets` and `loss`."""
        config = self
        for path, value in leaves(self.stages.get(name, {})):
            config = override(config, path, value)
        return config


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested dictionary as (dotted path, value) pairs."""
    pairs = []
    for key, value in tree.items():
        pairs += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def override(config: Any, path: str, value: Any, whole: str | None = None) -> Any:
    """A copy of a config dataclass with one dotted field set; strings are parsed by the field's type.

    Raises ConfigError for an unknown key (naming the nearest one) or a value of the wrong type.
    """
    whole = whole or path
    head, _, rest = path.partition(".")
    if whole == "recipe":
        raise ConfigError(f"recipe={value}: choose the recipe by --recipe {value}, or by `recipe:` in a config file")
    names = [f.name for f in dataclasses.fields(config)]
    if head not in names:
        near = difflib.get_close_matches(head, names, 1)
        hint = f"did you mean {whole.removesuffix(path) + near[0]!r}?" if near else f"known here: {', '.join(names)}"
        raise ConfigError(f"unknown config key {whole!r}; {hint}")
    if head == "stages" and isinstance(config, Config):
        return dataclasses.replace(config, stages=_override_stages(config, rest, value, whole))
    kind = typing.get_type_hints(type(config))[head]
    if dataclasses.is_dataclass(kind):
        if not rest:
            if not isinstance(value, dict):
                raise ConfigError(f"{whole!r} is a section; set its fields, for example {whole}.{_first_field(kind)}=…")
            for key, item in value.items():
                config = override(config, f"{head}.{key}", item, f"{whole}.{key}")
            return config
        child = override(getattr(config, head), rest, value, whole)
    elif rest:
        raise ConfigError(f"{whole!r}: {whole.removesuffix('.' + rest)!r} is a value, not a section")
    else:
        child = _parse(value, kind, whole)
    try:
        return dataclasses.replace(config, **{head: child})
    except ValueError as error:
        raise ConfigError(f"{whole}={value}: {error}") from None


def _first_field(kind: Any) -> str:
    return dataclasses.fields(kind)[0].name


def _override_stages(config: Config, rest: str, value: Any, whole: str) -> dict[str, dict[str, Any]]:
    if not rest:
        if not isinstance(value, dict):
            raise ConfigError(f"{whole!r} is a section; write for example stages.k4.train.steps=2000")
        for path, item in leaves(value):
            config = override(config, f"stages.{path}", item)
        return config.stages
    name, _, path = rest.partition(".")
    if path.partition(".")[0] not in ("train", "rollout", "targets", "loss"):
        raise ConfigError(f"{whole!r}: a stage's exceptions are stages.{name}.train.…, .rollout.…, .targets or .loss")
    parsed = override(config, path, value, whole)
    for part in path.split("."):
        parsed = getattr(parsed, part)
    return {**config.stages, name: {**config.stages.get(name, {}), path: parsed}}


def _parse(value: Any, kind: Any, whole: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str):
        if types.NoneType in options and value.lower() in ("none", "null", ""):
            return None
        if str in options:
            return value
        try:
            value = float(value) if float in options else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise ConfigError(f"{whole}={value}: expected {_name(options)}") from None
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in options:
        raise ConfigError(f"{whole}={value}: expected {_name(options)}, got {type(value).__name__}")
    return value


def _name(options: tuple[Any, ...]) -> str:
    return " or ".join("none" if option is types.NoneType else option.__name__ for option in options)


def load_file(path: str) -> dict[str, Any]:
    """A config file (YAML or JSON) as a nested dictionary."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML or JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a mapping of sections, found {type(tree).__name__}")
    return tree


def apply(config: Config, tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Apply a config file's tree, then `section.field=value` words."""
    for path, value in leaves(tree):
        config = override(config, path, value)
    for word in overrides:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}; overrides are written section.field=value")
        config = override(config, path, value)
    return config


def node_selector(label: str | None) -> dict[str, str] | None:
    """`key=value` as Ray's label selector. Raises ConfigError when it is written otherwise."""
    if label is None:
        return None
    key, equals, value = label.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"label {label!r} must be written key=value, as given to `ray start --labels`")
    return {key: value}


def describe_fields(cls: type = Config, prefix: str = "") -> str:
    """Every `section.field`, its type and its docstring, read from the source: the text of `--help`."""
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    kinds = typing.get_type_hints(cls)
    lines = []
    for statement, after in itertools.pairwise(body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = ast.unparse(statement.target)
        if dataclasses.is_dataclass(kinds[name]):
            lines.append(describe_fields(kinds[name], f"{prefix}{name}."))
        else:
            doc = " ".join(ast.literal_eval(after.value).split())
            lines.append(f"  {prefix}{name}  [{ast.unparse(statement.annotation)}]  {doc}")
    return "\n".join(lines)
