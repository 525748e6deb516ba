"""Rollouts: the frozen teacher of a stage turns token blocks into training targets, on its own actors.

    chunk numbers ─► read rows (tasks) ─► RolloutActor pool (teacher) ─► train workers, or Parquet when cached
          (Ray Data limits the rows on every arrow, so a slow consumer stops the producer)

A *chunk* holds the rows that one train worker consumes in a few optimiser steps. The step numbers alone determine which rows
those are (`StepPlan`). A stage is therefore one streaming execution, whatever its number of epochs, and a stage that is
resumed at step s starts the plan at s.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from kforcing.attention.windows import Windows
from kforcing.backbone import key_heads, load_ar
from kforcing.coupling import COUPLINGS
from kforcing.design import NoiseConfig
from kforcing.device import peak_gpu_mb, peak_rss_mb, pick_device
from kforcing.distillation.teachers import ARTeacher, StudentTeacher
from kforcing.keys import derive_key
from kforcing.modeling import PushForwardLM
from kforcing.noise import sample_anchors, uniform, window_noise
from kforcing.remote import fetch
from pipelines.data.rows import (
    epochs_of,
    positions_of,
    sequences_of,
    tokens_of,
    with_rollout,
    with_rollout_cost,
)
from pipelines.rollouts.plan import RolloutJob
from pipelines.tracking.metrics import set_gauge

# Sequences in one forward pass on a CPU, where larger batches are not faster.
CPU_BATCH = 16


class RolloutActor:
    """Holds the frozen teacher. Ray Data calls it with rows of tokens, and it returns them with anchors and targets."""

    def __init__(self, job: RolloutJob):
        torch.set_num_threads(job.threads)
        self.job = job
        self.device = pick_device()
        self.teacher: ARTeacher | StudentTeacher
        teacher = str(fetch(job.teacher))
        if job.ar:
            self.teacher = ARTeacher(load_ar(teacher).to(self.device), COUPLINGS[job.design.coupling])
        else:
            self.teacher = StudentTeacher(PushForwardLM.from_pretrained(teacher).to(self.device))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Token rows → the same rows with their rollouts and the cost of making them (see `pipelines.data.rows`)."""
        started = time.monotonic()
        batch = self.job.batch or self._fitting(tokens_of(rows.slice(0, 1)).shape[1])
        rolled = pa.concat_tables([self._roll_out(rows.slice(i, batch)) for i in range(0, len(rows), batch)])
        seconds = (time.monotonic() - started) / len(rolled)
        reached = float(positions_of(rows).max()) + 1
        set_gauge("kforcing_rollout_rows", reached, self.job.run, self.job.stage)
        cost = {"rollout_s": seconds, "rollout_rss_mb": peak_rss_mb(), "rollout_gpu_mb": peak_gpu_mb()}
        return with_rollout_cost(rolled, cost)

    def _fitting(self, context: int) -> int:
        if self.device.type != "cuda":
            return CPU_BATCH
        backbone = self.teacher.backbone if isinstance(self.teacher, ARTeacher) else self.teacher.student.backbone
        # This includes memory that torch has reserved and does not use, so the result does not shrink from call to call.
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        entries = self.job.windows * self.job.draws * self.job.k
        return fitting_batch(free, pass_bytes(backbone, context, entries))

    def _roll_out(self, rows: pa.Table) -> pa.Table:
        job, seq, epochs = self.job, sequences_of(rows), epochs_of(rows)
        keys = np.array([derive_key(job.seed, job.stage, "noise", e) for e in epochs])
        anchor_keys = torch.tensor([derive_key(job.seed, job.stage, "anchors", e) for e in epochs])
        tokens = tokens_of(rows)
        anchors = sample_anchors(anchor_keys, seq, tokens.shape[1], job.windows)
        anchors = anchors.repeat_interleave(job.draws, dim=1)
        noise = window_noise(torch.from_numpy(keys), seq, anchors, job.k)
        temperature = draw_temperature(anchor_keys, seq, job.design.noise)
        windows = Windows(*(x.to(self.device) for x in (tokens, anchors, noise, temperature)))
        if not job.teacher_top_k:
            return with_rollout(rows, windows, keys, self.teacher.rollout(windows), None)
        assert isinstance(self.teacher, ARTeacher), "labels come from the AR teacher"
        targets, labels = self.teacher.labelled_rollout(windows, job.teacher_top_k)
        return with_rollout(rows, windows, keys, targets, labels)


def pass_bytes(backbone: PreTrainedModel, context: int, entries: int) -> int:
    """Estimate of the bytes that a sequence of `context` tokens with `entries` block entries needs in a rollout.

    It counts keys and values of all layers, and a dozen vectors of the model's width for each token, which one layer uses.
    Logits are computed in chunks and are not counted.
    """
    config: Any = backbone.config
    size = next(backbone.parameters()).element_size()
    heads, width = key_heads(backbone)
    tokens = context + entries
    return size * tokens * (2 * config.num_hidden_layers * heads * width + 12 * config.hidden_size)


def fitting_batch(free: int, sequence: int) -> int:
    """Number of sequences of `sequence` bytes that fit in half of the free bytes: a power of two from 1 to 1024."""
    return 2 ** min(10, max(1, free // 2 // sequence).bit_length() - 1)


def draw_temperature(keys_B: torch.Tensor, seq_B: torch.Tensor, noise: NoiseConfig) -> torch.Tensor:
    """One temperature for each sequence, uniform in the range of the student: (B,) float32."""
    u = uniform(keys_B, seq_B, 0xFFFFFFFE, torch.zeros_like(seq_B)).float()
    return noise.temperature_min + u * (noise.temperature_max - noise.temperature_min)
