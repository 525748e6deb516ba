"""Decoding as a service: one lockstep batch of slots, k tokens for each at every step (see `engine.py`)."""

from kforcing.engine.engine import Engine, EngineConfig, EngineStats
from kforcing.engine.request import Completion, Output, Request, SamplingParams

__all__ = ["Completion", "Engine", "EngineConfig", "EngineStats", "Output", "Request", "SamplingParams"]
