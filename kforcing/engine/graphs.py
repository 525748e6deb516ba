"""Steps as CUDA graphs: one launch instead of hundreds. A graph belongs to a shape, and sizes come in powers of two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kforcing.engine.runner import ModelRunner, StepShape

Replay = Callable[[], Tensor]
CAPTURE_AT = 3
"""A shape's graph is captured at this use. A capture takes as long as some ten steps without a graph, and shapes between two
widths or at the edge of a bucket occur once."""


class Graphs:
    """`ModelRunner.step` with the same arguments; a shape that occurs often is captured as a graph."""

    def __init__(self, runner: ModelRunner, capture: Callable[[Callable[[], Tensor]], Replay]):
        self.runner, self.capture = runner, capture
        self.replays: dict[StepShape, Replay] = {}
        self.uses = Counter[StepShape]()
        """Of each shape, the steps that were no replay: they take much longer."""

    def __call__(self, shape: StepShape) -> Tensor:
        """See `ModelRunner.step`. The result is a copy, because the next replay writes to the same memory."""
        if shape not in self.replays:
            self.uses[shape] += 1
            if self.uses[shape] < CAPTURE_AT:
                return self.runner.step(shape)
            # Warming up and capturing run the step, so what it changes is put back. Keys and values are not: the real
            # step writes the same columns before it reads them.
            state = self.runner.step_state()
            before = [tensor.clone() for tensor in state]
            self.replays[shape] = self.capture(lambda: self.runner.step(shape))
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        return self.replays[shape]().clone()


def cuda_capture() -> Callable[[Callable[[], Tensor]], Replay]:
    """A function that captures steps as CUDA graphs of the current device. They share one memory pool: none run at once."""
    pool = torch.cuda.graph_pool_handle()
    return lambda step: _capture(step, pool)


def _capture(step: Callable[[], Tensor], pool: Any) -> Replay:
    """Run a step until its kernels are chosen, then record it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Thread-local: a replica that swaps weights captures in one thread while another thread decodes.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
