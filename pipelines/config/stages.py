"""What each stage of a run computes: the config, resolved once.

A run or an evaluation calls `resolve_run` when it starts. Everything below gets its records or single sections, and never the
whole `Config`. The fingerprint of a stage, which names its work, is computed here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kforcing.design import Design
from kforcing.remote import local
from pipelines.config.fingerprint import fingerprint, material
from pipelines.config.overrides import leaves, override
from pipelines.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    RolloutConfig,
    SelfTextConfig,
    TeacherConfig,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
)
from pipelines.files import content_digest


@dataclass(frozen=True)
class CorpusSpec:
    """What the token blocks of a run are made from, and where they are kept."""

    data: DataConfig
    tokenizer: TokenizerConfig
    given_tokenizer: str | None
    """Folder or hub id of the tokenizer, None when one is trained on the corpus."""
    gguf_file: str | None
    """File in that folder which holds the tokenizer, when it is GGUF."""
    cache: Path
    """Folder of prepared corpora."""
    self_text: SelfTextConfig
    seed: int
    """Of the text that the AR model writes itself."""


@dataclass(frozen=True)
class TeacherSpec:
    """The stage that makes the AR model: it copies a given model, or trains one from scratch."""

    config: TeacherConfig
    seed: int
    rollout: RolloutConfig
    """How rows travel to the train workers; this stage has no rollout actors."""
    name: str = "teacher"

    def fingerprint(self, corpus: str) -> str:
        """The name of this stage's work. A given model is named by its files; the training settings have no effect on it."""
        given = model_digest(*self.config.located()) if self.config.path else None
        return fingerprint(corpus, self.seed, given or self.config)

    @property
    def train(self) -> TrainConfig | None:
        """How the model is trained, or None when it is given."""
        return None if self.config.path else self.config.train

    def params(self) -> dict[str, Any]:
        """The settings of the stage, for tracking; a given model has none of architecture and training."""
        whole = dataclasses.asdict(self.config)
        given = {name: whole[name] for name in ("path", "gguf_file")}
        return {"k": 0, **(given if self.config.path else whole)}


@dataclass(frozen=True)
class StageSpec:
    """The stage that makes the student PFLM(k), with the stage's exceptions applied."""

    name: str
    k: int
    """Tokens that the student emits a forward pass."""
    seed: int
    targets: str
    """`ar` or `self`: who makes the training targets; the first stage has the AR teacher alone. `text`: the text has them."""
    loss: str
    design: Design
    train: TrainConfig
    rollout: RolloutConfig

    @property
    def learns(self) -> bool:
        """Whether there is anything to train; a sequential student of k = 1 is its teacher."""
        return self.design.learns(self.k)

    def fingerprint(self, corpus: str, teacher: str, previous: str | None) -> str:
        """The name of this stage's work: a hash of all that its result depends on.

        Args:
            corpus, teacher: fingerprints of the token blocks and of the AR model.
            previous: fingerprint of the student stage before this one; None for the first one.
        """
        return fingerprint(corpus, self.seed, [teacher, previous], *self._material())

    def _material(self) -> list[Any]:
        """The settings that have an effect on this stage; those without one are left out or set to a fixed value.

        Each read-out has parts of its own. A stage that learns nothing has no training. Only cached rollouts have epochs,
        only a soft loss has labels, and only on-policy windows have a step from which they are used. Muon's updates are not
        clipped. Text has no rollouts: of their settings it has the number of windows alone.
        """
        design = material(self.design.effective())
        if not self.design.sequential.draft_rank:
            del design["sequential"]["draft_rank"]  # earlier releases had no such setting
        if not self.learns:
            return [design]
        train, rollout = material(self.train), material(self.rollout)
        if self.train.muon_lr:
            train["clip"] = 0.0
        if self.targets == "text":
            sampled = self.train.sampled_tokens
            return [design, {**train, "sampled_tokens": sampled}, {"windows": self.rollout.windows}, "text", self.loss]
        if not self.train.on_policy_fraction:
            train["own_from"] = 0.0  # its name in fingerprints
        if not self.rollout.cache:
            rollout["cache_epochs"] = 0
        return [design, train, rollout, self.targets, self.loss]

    def params(self) -> dict[str, Any]:
        """The settings of the stage, for tracking: without training where it learns nothing, without rollouts for text."""
        design = {"k": self.k, "design": dataclasses.asdict(self.design)}
        if not self.learns:
            return design
        rollout = {"windows": self.rollout.windows} if self.targets == "text" else dataclasses.asdict(self.rollout)
        train = dataclasses.asdict(self.train)
        return {**design, "targets": self.targets, "loss": self.loss, "train": train, "rollout": rollout}

    def consistent(self) -> StageSpec:
        """The same stage with what follows from k and the loss: the first one has the AR teacher alone, and only a soft loss
        reads the teacher's probabilities.
        """
        targets, train, rollout = self.targets, self.train, self.rollout
        if self.k == 1 or self.targets == "text":
            train = dataclasses.replace(train, warm_start="teacher")
        if self.k == 1 and self.targets == "self":
            targets = "ar"
        if self.loss != "soft":
            rollout = dataclasses.replace(rollout, teacher_top_k=None)
        return dataclasses.replace(self, targets=targets, train=train, rollout=rollout)


@dataclass(frozen=True)
class RunSpec:
    """A whole run: its stages, the corpus before them and the evaluation after each of them."""

    root: Path
    """The run directory."""
    recipe: str
    seed: int
    corpus: CorpusSpec
    teacher: TeacherSpec
    students: tuple[StageSpec, ...]
    shared: StageSpec
    """The last student stage as the sections of the config describe it, without the exceptions of single stages. An
    evaluation derives the stages of other methods from it."""
    eval: EvalConfig
    tracking: TrackingConfig

    @property
    def ks(self) -> list[int]:
        """Tokens a forward pass of each student stage: 1, 2, 4, …"""
        return [spec.k for spec in self.students]


def resolve_run(config: Config) -> RunSpec:
    """All that a config says, by stage."""
    return RunSpec(
        config.root,
        config.recipe,
        config.seed,
        corpus_spec(config),
        teacher_spec(config),
        tuple(resolve(config)),
        _stage_of(config, config, config.student.k),
        config.eval,
        config.tracking,
    )


def corpus_spec(config: Config) -> CorpusSpec:
    """The corpus of a run. A teacher that is given brings its tokenizer, unless another one is named."""
    given: tuple[str | None, str | None] = (config.tokenizer.path, None)
    if config.teacher.path and not config.tokenizer.path:
        given = config.teacher.located()
    cache = local(config.data.cache_dir) if config.data.cache_dir else config.root.parent / "data"
    return CorpusSpec(config.data, config.tokenizer, *given, cache.absolute(), config.self_text, config.seed)


def teacher_spec(config: Config) -> TeacherSpec:
    """The stage of the AR model."""
    return TeacherSpec(config.teacher, config.seed, config.rollout)


def resolve(config: Config) -> list[StageSpec]:
    """The student stages of a run in the order in which they run: k = 1, 2, 4, …"""
    return [stage_spec(config, k) for k in config.ks()]


def stage_spec(config: Config, k: int) -> StageSpec:
    """One student stage: the sections of the run, the stage's exceptions, and what follows from k and the loss."""
    own = config
    for path, value in leaves(config.stages.get(f"k{k}", {})):
        own = override(own, path, value)
    return _stage_of(config, own, k).consistent()


def _stage_of(config: Config, own: Config, k: int) -> StageSpec:
    """The stage as its own sections say."""
    return StageSpec(f"k{k}", k, config.seed, own.targets, own.loss, config.student.design, own.train, own.rollout)


def evaluation_fingerprint(stage: str, config: EvalConfig) -> str:
    """The name of the held-out evaluation of a stage, whose fingerprint is given."""
    return fingerprint(stage, [config.blocks, config.windows, config.bootstrap])


def model_digest(path: str, gguf_file: str | None = None) -> dict[str, Any]:
    """What names a given model: the contents of its config and weights, wherever they lie; for a hub model, its id."""
    folder = Path(path)
    if not folder.is_dir():
        return {"id": path}
    patterns = [gguf_file] if gguf_file else ["*.safetensors", "*.bin"]
    files = sorted(f for p in ("config.json", "generation_config.json", *patterns) for f in folder.glob(p))
    return {"files": [(file.name, content_digest(file)) for file in files]}
