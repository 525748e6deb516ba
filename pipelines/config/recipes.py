"""Recipes: named starting points of a run. A test builds and validates every one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from kforcing.design import Design, NoiseConfig, SequentialConfig
from pipelines.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    RolloutConfig,
    SelfTextConfig,
    StudentConfig,
    TeacherConfig,
    TokenizerConfig,
    TrainConfig,
)
from pipelines.config.section import ConfigError

TEXT_TRAINING: dict[str, Any] = {
    "lr": 2e-3,
    "muon_lr": 0.02,
    "warmup": 30,
    "beta2": 0.95,
    "weight_decay": 0.01,
    "ema": 0.99,
    "sampled_tokens": 2048,
}
"""How students are trained on text."""


def sequential(config: Config, **parts: Any) -> Config:
    """A config turned to the sequential recipe: exact AR trunk, parallel hints, a small head, soft AR targets."""
    design = Design("sequential", "gumbel", sequential=SequentialConfig(**parts))
    student = dataclasses.replace(config.student, design=design)
    return dataclasses.replace(config, targets="ar", loss="soft", student=student)


def smoke() -> Config:
    """Every moving part in minutes on two cores: a tiny model, few steps, figures without meaning."""
    train = TrainConfig(steps=24, batch=8, micro_batch=4, warmup=4, checkpoint_every=8, log_every=4, lr=2e-3)
    config = Config(
        "smoke",
        data=DataConfig(max_docs=64, docs_per_shard=8, block=32, heldout_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=300, sample_chars=1_000_000),
        teacher=TeacherConfig(hidden=32, layers=2, heads=2, mlp=64, train=train),
        rollout=RolloutConfig(windows=8, batch=8),
        train=train,
        eval=EvalConfig(blocks=32, windows=8, bootstrap=200, prompt_tokens=8, new_tokens=16),
    )
    return sequential(config)


def _two_cores(name: str) -> Config:
    """The corpus and the AR model that `toy` and `paper` share: 0.9 M parameters on the State of the Union."""
    return Config(
        name,
        teacher=TeacherConfig(train=TrainConfig(steps=1000, batch=32, micro_batch=16, lr=3e-3, ema=0.99)),
        data=DataConfig(heldout_fraction=0.1),
        train=TrainConfig(steps=1000, batch=16, micro_batch=8, lr=2e-3, ema=0.99),
    )


def toy() -> Config:
    """All stages of a model so small that joint distributions can be enumerated, by the sequential recipe: 15 minutes."""
    stages = {"k2": {"train.steps": 700}, "k4": {"train.steps": 1900}}  # what `paper` spends, most of it on k = 4
    return dataclasses.replace(sequential(_two_cores("toy")), stages=stages)


def paper() -> Config:
    """The paper's recipe on the same corpus and AR model as `toy`."""
    stages = {"k1": {"train.steps": 1200}, "k4": {"train.steps": 700}}
    return dataclasses.replace(_two_cores("paper"), stages=stages)


def _paper_train(workers: int) -> TrainConfig:
    return TrainConfig(
        steps=500_000,
        batch=512,
        micro_batch=8,
        lr=1e-4,
        schedule="constant",
        warmup=0,
        precision="fp32",
        workers=workers,
        cpus_per_worker=4,
        gpus_per_worker=1,
        checkpoint_every=5_000,
        log_every=100,
    )


def _paper(name: str, data: DataConfig, tokenizer_from: str, block: int) -> Config:
    """The paper's settings (§2 of its appendix): 12 layers of 768, batch 512, 500 K steps a stage, 8 + 2 GPUs."""
    return Config(
        name,
        data=data,
        tokenizer=TokenizerConfig(path=tokenizer_from),
        teacher=TeacherConfig(
            hidden=768, layers=12, heads=12, mlp=3072, max_positions=2 * block, train=_paper_train(8)
        ),
        student=StudentConfig(design=Design(noise=NoiseConfig(min_cycles=1e-4, max_cycles=1.0))),
        rollout=RolloutConfig(windows=min(block, 128), actors=2, cpus_per_actor=4, gpus_per_actor=1),
        train=_paper_train(8),
        eval=EvalConfig(blocks=1024, windows=16, prompt_tokens=block // 16, new_tokens=block // 2, gpus_per_actor=1),
    )


def lm1b() -> Config:
    """The paper's LM1B run: bert-base-uncased tokens, length 128."""
    data = DataConfig(source="hf:dvruette/lm1b", block=128, heldout_fraction=0.005, docs_per_shard=8192)
    return _paper("lm1b", data, "bert-base-uncased", 128)


def owt() -> Config:
    """The paper's OpenWebText run: GPT-2 tokens, length 1024."""
    data = DataConfig(source="hf:Skylion007/openwebtext", block=1024, heldout_fraction=0.005, docs_per_shard=1024)
    return _paper("owt", data, "gpt2", 1024)


def hf() -> Config:
    """A k=4 student of a given Hugging Face causal LM, trained on text that it writes itself: set `teacher.path`."""
    train = TrainConfig(
        steps=2_000,
        batch=128,
        micro_batch=4,
        precision="bf16",
        zero_stage=2,
        workers=8,
        cpus_per_worker=4,
        gpus_per_worker=1,
        checkpoint_every=200,
        log_every=20,
        **TEXT_TRAINING,
    )
    config = Config(
        "hf",
        data=DataConfig(source="self", block=512, docs_per_shard=256),
        self_text=SelfTextConfig(
            documents=100_000, docs_per_shard=512, slots=512, actors=2, cpus_per_actor=4, gpus_per_actor=1
        ),
        teacher=TeacherConfig(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        rollout=RolloutConfig(windows=508),
        train=train,
        eval=EvalConfig(blocks=512, gpus_per_actor=1),
    )
    return _on_text(config, hint_layers=3)


def quickstart() -> Config:
    """A k=4 student of SmolLM2-135M-Instruct in 30 minutes of two cores, trained on conversations that it wrote itself."""
    return _smollm2("quickstart", steps=400, hint_layers=1)


def smollm2() -> Config:
    """`quickstart` with an evening of two cores, and three hint layers."""
    return _smollm2("smollm2", steps=4000, hint_layers=3)


def _smollm2(name: str, steps: int, hint_layers: int) -> Config:
    config = Config(
        name,
        data=DataConfig(source="smollm2-chat", block=256, docs_per_shard=64),
        teacher=TeacherConfig(path="smollm2"),
        rollout=RolloutConfig(windows=252),
        train=TrainConfig(
            steps=steps,
            batch=2,
            micro_batch=1,
            cpus_per_worker=0.5,
            checkpoint_every=100,
            log_every=10,
            **TEXT_TRAINING,
        ),
        eval=EvalConfig(blocks=16, windows=16, prompt_tokens=48, new_tokens=96, batch=8),
    )
    return _on_text(config, hint_layers)


def _on_text(config: Config, hint_layers: int) -> Config:
    """A config turned to training a sequential student on text that the AR model inside it labels."""
    config = sequential(config, hint_layers=hint_layers, shortlist=64, draft_rank=128)
    return dataclasses.replace(config, targets="text", loss="length")


RECIPES: dict[str, Callable[[], Config]] = {
    r.__name__: r for r in (smoke, quickstart, smollm2, toy, paper, lm1b, owt, hf)
}

FORMER_NAMES = {"toy": "quickstart"}
"""Recipes whose runs may be recorded under another name."""


def recipe(name: str) -> Config:
    """Build a recipe by name. Raises ConfigError for an unknown one, naming the nearest."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}; {hint} known: {', '.join(RECIPES)}")
    return RECIPES[name]()
