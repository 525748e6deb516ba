"""Push-forward language models: k tokens of one forward pass (K-Forcing)."""

from kforcing.model import Design, NoiseConfig, PushForwardConfig, PushForwardLM, SequentialConfig

__all__ = ["Design", "NoiseConfig", "PushForwardConfig", "PushForwardLM", "SequentialConfig"]
