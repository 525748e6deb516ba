"""Push-forward language models: several tokens per forward pass from an existing AR backbone."""

from kforcing.model import NoiseConfig, PushForwardConfig, PushForwardLM

__all__ = ["NoiseConfig", "PushForwardConfig", "PushForwardLM"]
