"""Decoding as a service: one lockstep batch of slots, k tokens for each at every step (see `engine.py`)."""

from kforcing.engine.engine import Counts, Engine, EngineConfig
from kforcing.engine.request import Completion, Output, Request, Sampling

__all__ = ["Completion", "Counts", "Engine", "EngineConfig", "Output", "Request", "Sampling"]
