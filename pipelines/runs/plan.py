"""What a run would do and need, computed from its config alone: `distill.py --plan`.

Models are built on torch's meta device, so that no weights are read and nothing is started. FLOPs are those of matrix
products and attention (a multiply-add is two): 2 for each weight and token in a forward pass, and 4 more where weights are
trained; tests hold them to within a quarter of what is counted. Memory is that of tensors: weights, gradients, optimiser,
moving average, logits and activations of one train worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kforcing.backbone import head, text_config
from kforcing.configuration import PushForwardConfig
from kforcing.distillation.text import MATCH_STRIDE
from kforcing.loading import load_tokenizer
from kforcing.metrics.flops import matrix_sizes
from kforcing.modeling import PushForwardLM
from kforcing.readout.base import as_student
from pipelines.config.schema import Config, TrainConfig
from pipelines.config.stages import RunSpec, StageSpec, resolve_run
from pipelines.training.initial_model import llama_config

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class StagePlan:
    """A stage that trains or copies a model."""

    name: str
    parameters: int
    """Of the model that it leaves."""
    trained: int
    """Of those, the parameters that are trained."""
    steps: int
    tokens: int
    """Tokens of text that its steps read, over all epochs."""
    windows: int
    """Windows whose blocks are trained; 0 for an AR model."""
    rollout_flops: float
    train_flops: float
    worker_bytes: int
    """Tensors of one train worker."""
    disk_bytes: int
    """The model, and two checkpoints while it is trained."""

    @property
    def flops(self) -> float:
        """Of rollouts and training together."""
        return self.rollout_flops + self.train_flops


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights in matrices."""

    trunk: float
    lm_head: int
    width: int
    layers: int
    hints: float = 0
    head: float = 0
    """The read-out's own matrices, without hint layers and low-rank head."""

    def read(self, tokens: int, length: int) -> float:
        """FLOPs of a forward pass of the trunk over sequences of this length; a token sees half of its sequence."""
        return tokens * (2 * self.trunk + 2 * length * self.width * self.layers)


def plan_run(config: Config) -> list[StagePlan]:
    """The stages of a run in their order."""
    spec = resolve_run(config)
    backbone = _meta_backbone(spec)
    return [_teacher(spec, config, backbone), *(_student(stage, config, backbone) for stage in spec.students)]


def describe_plan(config: Config, flops_per_s: float) -> str:
    """The plan as lines for a terminal: one for each stage, then the sums."""
    stages = plan_run(config)
    lines = [f"{'stage':<8} {'parameters':>11} {'trained':>9} {'steps':>7} {'text tokens':>11} {'windows':>11} "]
    lines[0] += f"{'rollouts':>9} {'training':>9} {'hours':>7} {'memory a worker':>15} {'disk':>8}"
    for s in stages:
        lines.append(
            f"{s.name:<8} {_short(s.parameters):>11} {_short(s.trained):>9} {s.steps:>7} {_short(s.tokens):>11} "
            f"{_short(s.windows):>11} {s.rollout_flops:>9.1e} {s.train_flops:>9.1e} {s.flops / flops_per_s / 3600:>7.2f} "
            f"{s.worker_bytes / 2**30:>11.1f} GiB {s.disk_bytes / 2**30:>4.1f} GiB"
        )
    total, disk = sum(s.flops for s in stages), sum(s.disk_bytes for s in stages)
    lines.append(
        f"in all {total:.2e} FLOPs, {total / flops_per_s / 3600:.2f} hours at {flops_per_s:.1e} FLOP/s (--flops-per-s), and "
        f"{disk / 2**30:.1f} GiB beside the corpus, of which a token takes {FLOAT} bytes. Evaluation, the start of "
        "processes, text that the AR model writes itself, and what Python and libraries hold (about 1 GiB a process) "
        "are not counted."
    )
    return "\n".join(lines)


def _short(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)


def _meta_backbone(spec: RunSpec) -> Any:
    """The AR model without weights."""
    teacher = spec.teacher.config
    if teacher.path:
        folder, file = teacher.located()
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False, **({"gguf_file": file} if file else {}))
        config = text_config(whole)
        config.tie_word_embeddings = getattr(whole, "tie_word_embeddings", False)
    else:
        config = llama_config(teacher, _vocabulary(spec), eos=0)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def _vocabulary(spec: RunSpec) -> int:
    given = spec.corpus.given_tokenizer
    return len(load_tokenizer(given, spec.corpus.gguf_file)) if given else spec.corpus.tokenizer.vocab_size


def _sizes(model: Any) -> _Sizes:
    sizes, student = matrix_sizes(model), as_student(model)
    backbone: Any = student.backbone if student else model
    width, layers = head(backbone).weight.shape[1], backbone.config.num_hidden_layers
    # The trunk's own layers are not trained where hints use them, which saves a third of their FLOPs.
    return _Sizes(sizes.trunk, sizes.lm_head, width, layers, sizes.hints + 2 / 3 * sizes.adapted, sizes.head)


def _teacher(spec: RunSpec, config: Config, backbone: Any) -> StagePlan:
    sizes, total = _sizes(backbone), sum(p.numel() for p in backbone.parameters())
    train = spec.teacher.train
    if train is None:
        return StagePlan("teacher", total, 0, 0, 0, 0, 0.0, 0.0, FLOAT * total, FLOAT * total)
    block = config.data.block
    tokens = train.steps * train.batch * block
    flops = 3 * (sizes.read(tokens, block) + 2 * tokens * sizes.lm_head)
    activations = train.micro_batch * block * sizes.width * sizes.layers * 20
    memory = _worker_bytes(total, total, train, sizes, activations)
    return StagePlan("teacher", total, total, train.steps, tokens, 0, 0.0, flops, memory, _disk(total, total))


def _student(stage: StageSpec, config: Config, backbone: Any) -> StagePlan:
    with torch.device("meta"):
        model: Any = PushForwardLM(PushForwardConfig(stage.k, backbone.config.to_dict(), stage.design), backbone)
    sizes, total = _sizes(model), sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not stage.learns:
        return StagePlan(stage.name, total, 0, 0, 0, 0, 0.0, 0.0, FLOAT * total, FLOAT * total)
    train, block = stage.train, config.data.block
    rows = train.steps * train.batch
    tokens, windows = rows * block, rows * stage.rollout.windows * stage.rollout.draws
    if stage.targets == "text":
        windows, rollouts = rows * stage.rollout.windows, 0.0
        flops = sizes.read(tokens, block) + windows * _text_window(stage, sizes)
    else:
        # AR targets take k − 1 passes behind the context; a student makes k / 2 tokens twice, and reads the first ones again.
        entries = stage.k - 1 if stage.targets == "ar" or stage.k == 1 else 1.5 * stage.k
        rollouts = sizes.read(tokens, block) + windows * 2 * (entries * sizes.trunk + stage.k * sizes.lm_head)
        rollouts /= stage.rollout.cache_epochs if stage.rollout.cache else 1  # cached ones are made once
        flops = _window_training(stage, sizes, tokens, block, windows)
    entries = train.micro_batch * stage.rollout.windows * stage.k * sizes.width
    read = train.micro_batch * block * sizes.width * sizes.layers
    depth = (getattr(model.readout, "layers", None) or backbone.base_model).config.num_hidden_layers
    activations = 20 * (entries * depth + (0 if stage.design.exact_trunk else read)) + 2 * read
    memory = _worker_bytes(total, trained, train, sizes, activations)
    return StagePlan(
        stage.name, total, trained, train.steps, tokens, windows, rollouts, flops, memory, _disk(total, trained)
    )


def _text_window(stage: StageSpec, sizes: _Sizes) -> float:
    """FLOPs of a window whose block is the text's own, without the trunk's pass."""
    later, vocabulary = stage.k - 1, sizes.lm_head // sizes.width
    sampled = stage.train.sampled_tokens
    # The likeliest tokens of the positions of a chunk overlap: about 2,400 were counted on SmolLM2's own text.
    scored = min(vocabulary, sampled + 2400) if sampled else vocabulary
    logits = later * 2 * 2 * scored * sizes.width  # forward, and back to the states; the LM head is not trained
    measured = later * 2 * sizes.lm_head / MATCH_STRIDE
    return 2 * sizes.lm_head + later * 6 * (sizes.hints + sizes.head) + logits + measured


def _window_training(stage: StageSpec, sizes: _Sizes, tokens: int, block: int, windows: int) -> float:
    """FLOPs of training on rolled-out windows."""
    k, own = stage.k, stage.design.conditional
    passes = 1 if stage.design.exact_trunk else 3
    context = passes * sizes.read(tokens, block)
    head_flops = (4 if stage.design.exact_trunk else 6) * k * sizes.lm_head
    entries = (k - 1) * 6 * (sizes.hints + sizes.head) if own else k * 6 * (sizes.trunk + sizes.head)
    labels = (
        k * 2 * sizes.lm_head + (k - 1) * 2 * sizes.trunk
        if stage.loss == "soft" and not stage.rollout.teacher_top_k
        else 0
    )
    return context + windows * (entries + head_flops + labels)


def _worker_bytes(total: int, trained: int, train: TrainConfig, sizes: _Sizes, activations: int) -> int:
    number = 2 if train.precision == "bf16" else FLOAT
    weights = number * (total + trained)  # and their gradients
    optimizer = 3 * FLOAT * trained // train.workers  # float32 weights of its own and two moments
    average = FLOAT * trained // train.workers if train.ema else 0
    logits = 3 * FLOAT * train.loss_chunk * sizes.lm_head // sizes.width
    return weights + optimizer + average + logits + number * activations


def _disk(total: int, trained: int) -> int:
    return FLOAT * (total + 2 * 4 * trained)
