"""Push-forward language models: k tokens of one forward pass (K-Forcing)."""

from kforcing.configuration import PushForwardConfig
from kforcing.design import Design, NoiseConfig, SequentialConfig
from kforcing.modeling import PushForwardLM

__all__ = ["Design", "NoiseConfig", "PushForwardConfig", "PushForwardLM", "SequentialConfig"]
