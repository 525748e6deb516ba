"""Fidelity by distance from the prompt, where the context of a decoder is its own text."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kforcing.backbone import load_ar
from kforcing.coupling import COUPLINGS
from kforcing.device import pick_device
from kforcing.engine.config import context_limit
from kforcing.metrics.diversity import diversity
from kforcing.metrics.free_run import free_run, same_so_far
from kforcing.modeling import PushForwardLM
from pipelines.evaluation.decoders import EngineDecoder
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import heldout

BINS = 8
"""Stretches of the text, each of which has one figure."""


def free_run_of_student(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """Match, NLLs and equality of a student's free run, for each of `BINS` stretches of it (see `metrics/free_run.py`)."""
    config, fidelity, device = measurement.config, measurement.config.fidelity, pick_device()
    teacher = load_ar(measurement.subject.teacher).to(device)
    positions = context_limit(teacher.config) or 10**9
    new = min(fidelity.free_tokens, positions - config.text.prompt_tokens - measurement.subject.last.k)
    prompts = heldout(measurement, fidelity.free_prompts, config.text.prompt_tokens, first=500)
    assert measurement.student is not None
    model = PushForwardLM.from_pretrained(measurement.student.path).to(device)
    coupling = model.config.design.coupling
    made = EngineDecoder(model, measurement.k, coupling).decode(prompts.tokens_RN, new, prompts.seeds).tokens_RT
    own = EngineDecoder(teacher, 1, coupling).decode(prompts.tokens_RN, new, prompts.seeds).tokens_RT
    run = free_run(teacher, prompts.tokens_RN, made.to(device), prompts.seeds, COUPLINGS[coupling])
    edges = np.unique(np.linspace(0, new, BINS + 1).astype(int))
    curves: dict[str, list[Any]] = {"upto": edges[1:].tolist()}
    for name, values in (*asdict(run).items(), ("same", same_so_far(made, own))):
        curves[name] = []
        for a, b in itertools.pairwise(edges):
            sums = values[:, a:b].double().sum(1).cpu().numpy()
            curves[name] += measurement.over_documents(sums[:, None], np.full(len(sums), float(b - a)), prompts.doc_R)
    repetition = diversity(made.tolist()).intervals(config.bootstrap, config.seed, prompts.doc_R)["repetition"]
    assert repetition is not None
    return {"k": measurement.k, **curves, "repetition": asdict(repetition)}
