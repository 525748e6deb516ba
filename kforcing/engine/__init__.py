"""The decode engine: one lockstep batch of slots, and one or more tokens for each running request at every step.

request.py     what is asked for: Request, SamplingParams; what comes back: Output, Completion
config.py      EngineConfig, EngineStats
scheduler.py   which request has which slot, and when its prompt is read
runner.py      one step for all slots; fixed and exact mode
drafts.py      exact mode: drafts from a request's own prompt and answer
width.py       exact mode: how many tokens the next block has
sampler.py     tokens from logits, each slot by its request's options
layers.py      transformer layers over cache.py; linear.py and graphs.py make them fast on CPUs and GPUs
engine.py      Engine: submit, step, cancel, stream, generate
"""

from kforcing.engine.config import EngineConfig, EngineStats
from kforcing.engine.engine import Engine, checked_sizes
from kforcing.engine.request import Completion, DraftCounts, Output, Request, SamplingParams, TokenLogprobs

__all__ = [
    "Completion",
    "DraftCounts",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "checked_sizes",
]
