"""Push-forward language models: k tokens of one forward pass (K-Forcing)."""

from kforcing.configuration import PushForwardConfig
from kforcing.design import Design, NoiseConfig, SequentialConfig
from kforcing.llm import LLM, CompletionOutput, RequestOutput, SamplingParams
from kforcing.modeling import PushForwardLM
from kforcing.structured import StructuredOutputs
from kforcing.version import __version__

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
