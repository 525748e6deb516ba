"""Steps as CUDA graphs: one launch instead of hundreds. A graph belongs to a shape; shapes come in powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kforcing.engine.runner import ModelRunner

Replay = Callable[[], Tensor]


class Graphs:
    """`ModelRunner.step` with the same arguments; the first call of each shape captures it."""

    def __init__(self, runner: ModelRunner, capture: Callable[[Callable[[], Tensor]], Replay]):
        self.runner, self.capture = runner, capture
        self.replays: dict[tuple[int, int, bool], Replay] = {}

    def __call__(self, R: int, columns: int, plain: bool, masked: bool = True) -> Tensor:
        """See `ModelRunner.step`. The result is a copy: the next replay writes to the same place."""
        key = (R, columns, plain)
        if key not in self.replays:
            runner = self.runner
            # Warming up and capturing run the step; what it moves forward is put back. What it writes beyond is not
            # read before the real step writes it again.
            length_S, counts_SV = runner.length_S.clone(), runner.sampler.counts_SV.clone()
            self.replays[key] = self.capture(lambda: runner.step(R, columns, plain))
            runner.length_S.copy_(length_S)
            runner.sampler.counts_SV.copy_(counts_SV)
        return self.replays[key]().clone()


def cuda_capture() -> Callable[[Callable[[], Tensor]], Replay]:
    """What captures steps as CUDA graphs of the current device, in one pool of memory: they never run at a time."""
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
    # Thread-local: a replica that swaps weights captures in one thread while another decodes.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
