"""Push-forward language models: k tokens of one forward pass (K-Forcing)."""

from kforcing.design import Design, PushForwardConfig
from kforcing.modeling import NoiseConfig, PushForwardLM, SequentialConfig

__all__ = ["Design", "NoiseConfig", "PushForwardConfig", "PushForwardLM", "SequentialConfig"]
