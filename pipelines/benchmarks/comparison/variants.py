"""The variants that are compared: both recipes, and one change at a time; and a variant as a job."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.overrides import apply, override
from pipelines.config.recipes import recipe
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.config.stages import StageSpec, stage_spec
from pipelines.config.validation import validate

EARLY = 0.15
"""Share of the budget of k = 4 that the sequential recipe spends on k = 2."""


@dataclass(frozen=True)
class Variant:
    """A named change to one of the two recipes."""

    name: str
    recipe: str
    words: dict[str, Any] = field(default_factory=dict)
    ks: tuple[int, ...] = (2, 4)
    """Stages that are measured."""
    early: float | None = None
    """Share of the budget of k = 4 to spend on k = 2, when it is not the paper's."""


def variants() -> list[Variant]:
    """Both recipes, then one change at a time to the sequential one."""
    part = "student.design.sequential."
    changes: dict[str, dict[str, Any]] = {
        "head alone": {part + "hints": "none", part + "draft": "none"},
        "hints: 1 layer": {part + "hint_layers": 1},
        "hints: half (2 layers)": {part + "hint_layers": 2},
        "hints: adapters": {part + "hints": "adapter"},
        "hints see no token": {part + "draft": "none"},
        "hints see a bigram draft": {part + "draft": "bigram"},
        "m = 8": {"rollout.teacher_top_k": 8},
        "m = full": {"rollout.teacher_top_k": 10**9},
        "local labels": {"rollout.teacher_top_k": None},
        "local, own windows": {"rollout.teacher_top_k": None, "train.on_policy_fraction": 0.5},
        "hard targets": {"loss": "hard"},
        "all weights": {part + "freeze_trunk": False},
        "shortlist of 32": {part + "shortlist": 32},
    }
    return [
        Variant("paper", "paper"),
        Variant("paper, AR targets", "paper", {"targets": "ar"}),
        Variant("sequential, k = 2", "toy", {"student.k": 2}, (2,)),
        Variant("sequential", "toy", ks=(4,), early=EARLY),
        *(Variant(name, "toy", words, (4,), EARLY) for name, words in changes.items()),
        Variant("long k = 2", "toy", ks=(4,)),
        Variant("k = 8", "toy", {"student.k": 8}, (8,), EARLY),
    ]


@dataclass(frozen=True)
class TrainingJob:
    """One variant with one seed, and all its process needs."""

    variant: Variant
    stages: tuple[StageSpec, ...]
    """With the job's seed."""
    teacher: str
    train: str
    heldout: str
    folder: str
    budgets: dict[int, float]
    """FLOPs to have spent up to each k."""
    references: str
    """File of the teacher's samples."""
    samples: int
    """Blocks drawn after each context for the joint figures."""

    @property
    def seed(self) -> int:
        """The seed of its stages."""
        return self.stages[0].seed


@dataclass(frozen=True)
class Options:
    """The command line."""

    only: list[str] | None
    seeds: int
    share: float
    samples: int
    words: list[str]


PLACES = ("output_dir=", "data.cache_dir=", "tracking.")


def config_of(variant: Variant, seed: int, options: Options) -> Config:
    """A variant's config with a seed, validated; `options.share` scales the paper's steps, and with them every budget."""
    config = dataclasses.replace(recipe(variant.recipe), seed=seed)
    for name, value in variant.words.items():
        config = override(config, name, value)
    config = apply(config, {}, [word for word in options.words if not word.startswith(PLACES)])
    stages = {name: stage for name, stage in config.stages.items() if name in [f"k{k}" for k in config.ks()]}
    config = dataclasses.replace(config, stages=stages)
    if variant.recipe == "paper":
        for k in config.ks():
            steps = stage_spec(config, k).train.steps
            config = override(config, f"stages.k{k}.train.steps", max(1, round(options.share * steps)))
    with tempfile.TemporaryDirectory() as folder:
        validate(dataclasses.replace(config, output_dir=f"{folder}/none"))
    noise = config.student.design.noise
    for name, value, only in (
        ("rollout.cache", config.rollout.cache, False),
        ("train.precision", config.train.precision, "fp32"),
        ("student.design.noise.temperature_min", noise.temperature_min, 1.0),
        ("student.design.noise.temperature_max", noise.temperature_max, 1.0),
    ):
        if value != only:
            raise ConfigError(f"{name}={value}: variants are compared with {name}={only} only; leave it out")
    return config
