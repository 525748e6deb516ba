"""Push-forward language models: k tokens of one forward pass (K-Forcing).

The names below are imported when they are first used, and torch and transformers with them: most processes of a Ray cluster
need a record or a function of this package and neither of the two, which take seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from kforcing.version import __version__

if TYPE_CHECKING:
    from kforcing.configuration import PushForwardConfig
    from kforcing.design import Design, NoiseConfig, SequentialConfig
    from kforcing.llm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from kforcing.modeling import PushForwardLM
    from kforcing.structured import StructuredOutputs

__all__ = [
    "LLM",
    "CompletionOutput",
    "Design",
    "NoiseConfig",
    "PushForwardConfig",
    "PushForwardLM",
    "RequestOutput",
    "SamplingParams",
    "SequentialConfig",
    "StructuredOutputs",
    "__version__",
]
_PLACES = {
    "configuration": ("PushForwardConfig",),
    "design": ("Design", "NoiseConfig", "SequentialConfig"),
    "llm": ("LLM", "CompletionOutput", "RequestOutput", "SamplingParams"),
    "modeling": ("PushForwardLM",),
    "structured": ("StructuredOutputs",),
}
_MODULE = {name: f"{__name__}.{module}" for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(auto: Any) -> None:
    """Students are known to `AutoConfig`; their config brings their model, which `kforcing.modeling` registers."""
    config = import_module("kforcing.configuration").PushForwardConfig
    auto.AutoConfig.register(config.model_type, config)
