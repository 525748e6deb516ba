"""Settings of an engine, their validation, and the statistics that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kforcing.backbone import text_config
from kforcing.coupling import COUPLINGS
from kforcing.engine.layers import STATIC_ROPE
from kforcing.engine.request import ACCEPTANCES, DraftCounts
from kforcing.readout.base import Student

QUANTIZATIONS = (None, "int8")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine."""

    max_num_seqs: int = 16
    """The number of slots: requests that run at the same time."""
    max_model_len: int | None = None
    """The longest prompt and continuation together, in tokens; None takes what the model's positions allow, at most 2,048."""
    k: int | None = None
    """Tokens a step at most; None takes the student's k, or 1 for an AR model. An AR model takes more in exact mode, where
    drafts come from the context."""
    acceptance: str = "fixed"
    """The mode of requests that do not choose one: `exact` or `fixed` (see `Request.acceptance`)."""
    adapt_width: bool = True
    """Exact mode: choose the length of each step's blocks, from 1 to k, by what steps cost and what drafts bring (see
    `width.py`). The text does not depend on it. Without it every block has k tokens."""
    context_ngram: int = 3
    """Exact mode: where up to so many of the last tokens occurred before in a request's prompt or answer, the tokens that
    followed are drafts (see `drafts.py`). A student's are taken as long as they are accepted more often. 0 turns this off."""
    max_num_batched_tokens: int = 256
    """Prompt tokens that are read between two steps. This bounds how long a new prompt delays the running requests."""
    prefix_cache_mb: int = 0
    """MiB for keys and values of prompts that were read, so that a prompt with the same beginning starts from them (see
    `prefix_cache.py`); 0 for none."""
    prefix_cache_device: str | None = None
    """Where they are kept, for example `cpu`; None for the model's device."""
    check_every: int | None = None
    """Steps between two looks at the tokens; None takes 1 on a CPU and 8 on a GPU. A request that has ended runs on until
    the next look, and the tokens that it makes meanwhile are dropped."""
    batch_invariant: bool = False
    """Run every step and every chunk of a prompt in one shape, whatever the slots hold, so that rounding does not depend on
    the other requests. This matters in half precision. Empty slots then cost as much as full ones."""
    coupling: str = "inverse_cdf"
    """How noise picks a token from an AR model's distribution; a student brings its own coupling."""
    compiled: bool = False
    """Run the layers through torch.compile. On a CPU it needs a C++ compiler and excludes `row_kernel`, which gains more."""
    row_kernel: bool | None = None
    """Multiply up to 128 rows by the weights with our own kernel (`cpu/products.py`): 16 rows take about twice as long as
    one, and half as long as with torch. None means yes where it can run: on a CPU under Linux with llvmlite."""
    quantization: str | None = None
    """`int8` holds the weights of linear maps (`nn.Linear`) as 8-bit numbers with a scale for each output. AR decoding on a
    CPU is 1.5 to 2 times as fast, and the model changes a little: exact mode then gives the text of that AR model."""
    int8_drafts: bool | None = None
    """Make the drafts of a sequential student with weights of 8 bits in steps all of whose requests verify them: such
    weights are read faster, and the text does not depend on drafts. None means yes where `row_kernel` runs and `acceptance`
    is exact."""
    graphs: bool | None = None
    """Replay steps as CUDA graphs, one for each shape of a step; None means yes on a GPU."""


@dataclass
class EngineStats(DraftCounts):
    """Counts of what an engine has done since it was made, and what became of the drafts of all requests."""

    steps: int = 0
    prefill_tokens: int = 0
    """Prompt tokens that were read before the first step of their request."""
    cached_tokens: int = 0
    """Prompt tokens that were taken over from earlier prompts instead."""
    tokens: int = 0
    """Tokens returned."""
    slot_steps: int = 0
    """Steps, summed over the requests that ran in them."""
    discarded: int = 0
    """Final tokens that were not returned: they lie behind a stop id, a limit or a cancellation."""
    context_drafted: int = 0
    """How many of all drafts came from the context."""
    context_accepted: int = 0
    """How many of these were accepted."""
    widths: dict[int, int] = field(default_factory=dict)
    """How many steps made blocks of each width."""

    @property
    def tokens_a_step(self) -> float:
        """Tokens returned for each step that a request took part in; 0 before the first step."""
        return self.tokens / self.slot_steps if self.slot_steps else 0.0


def context_limit(config: Any) -> int | None:
    """The number of positions up to which the engine computes the same as the model on a whole sequence; None for no limit.

    It is the smallest of: the model's number of positions; its window, where attention slides, because the engine attends to
    all columns of a slot; and the length that it was first trained on, where rotary angles change with the length of the
    longest sequence of a batch (rope types `dynamic` and `longrope`).
    """
    config = text_config(config)
    limits = [getattr(config, "max_position_embeddings", None)]
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=None)


def checked_k(k: int | None, most: int) -> int:
    """The tokens a step that are asked for, `most` when k is None. Raises ValueError when they are not 1 to `most`."""
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ValueError(f"k={k} tokens a step asked where 1 to {most} can be made")
    return k


def checked_length(max_model_len: int | None, limit: int | None, k: int) -> int:
    """The longest sequence of an engine. Raises ValueError when the model cannot read so many positions."""
    most = None if limit is None else limit - k + 1
    max_model_len = min(2048, most or 2048) if max_model_len is None else max_model_len
    if max_model_len < 2 or (most is not None and max_model_len > most):
        raise ValueError(
            f"max_model_len={max_model_len} (prompt and new tokens together): choose 2 to {most or 'any number'}; the model "
            f"reads {limit or 'any number of'} positions, and a block of {k} may begin at the last of them"
        )
    return max_model_len


def checked_ar_k(config: EngineConfig) -> int:
    """The tokens a step of an engine with an AR model. Raises ValueError when drafts have no source or no use."""
    k = 1 if config.k is None else config.k
    if k < 1:
        raise ValueError(f"k={k} tokens a step asked; choose at least 1")
    if k > 1 and (config.acceptance != "exact" or config.context_ngram < 1):
        raise ValueError(
            f"k={k} of an AR model, which makes one token a step itself, needs drafts from the context: set "
            "acceptance=exact and context_ngram to at least 1, or leave k out"
        )
    return k


def check_acceptance(acceptance: str, student: Student | None) -> None:
    """Raise ValueError for an unknown mode, or for exact mode with a student that does not contain its AR model."""
    if acceptance not in ACCEPTANCES:
        raise ValueError(f"acceptance={acceptance}: choose one of {', '.join(ACCEPTANCES)}")
    if acceptance == "exact" and student is not None and not student.design.exact_trunk:
        raise ValueError(
            "acceptance=exact needs the AR model inside the student to verify tokens, and this student has changed it "
            f"(readout={student.design.readout}, freeze_trunk={student.design.sequential.freeze_trunk}); use "
            "acceptance=fixed, or a sequential student with a frozen trunk"
        )


def check_config(config: EngineConfig, student: Student | None) -> None:
    """Raise ValueError for sizes below 1 and unknown choices."""
    sizes = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "check_every": 1 if config.check_every is None else config.check_every,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if config.context_ngram < 0:
        raise ValueError(f"context_ngram={config.context_ngram} must be at least 0 (0 for no drafts from the context)")
    if config.prefix_cache_mb < 0:
        raise ValueError(f"prefix_cache_mb={config.prefix_cache_mb} must be at least 0 (0 for no cache of prompts)")
    if config.quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={config.quantization}: choose int8, or leave it out")
    if config.quantization and config.row_kernel is False:
        raise ValueError(f"quantization={config.quantization} needs the kernel of CPUs; leave row_kernel out")
    if config.coupling not in COUPLINGS:
        raise ValueError(f"coupling={config.coupling}: choose one of {', '.join(COUPLINGS)}")
    check_acceptance(config.acceptance, student)
