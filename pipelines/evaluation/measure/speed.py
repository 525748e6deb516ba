"""Tokens a second of every row. Nothing else runs on the machine while this part does."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from kforcing.backbone import load_ar
from kforcing.baselines.base import Decoder
from kforcing.device import pick_device
from kforcing.engine import Engine, EngineConfig, Request
from pipelines.evaluation.decoders import rows_in
from pipelines.evaluation.measure.measurement import Measurement
from pipelines.evaluation.measure.prompts import ROWS_A_PROMPT, heldout


def speed(folder: Path, measurement: Measurement, given: Any) -> dict[str, Any]:
    """Tokens a second of every row, reading of prompts included, and the cost of batch invariance.

    Rows take turns and the figure is the median of all rounds. Each round has its own prompts, because decoders that
    verify are faster on text that is easy to guess.
    """
    config, rows = measurement.config, rows_in(measurement.root)
    rates: dict[str, dict[str, list[float]]] = {row.name: {} for row in rows}
    for number in range(config.speed.rounds):
        for row in rows:
            decoder = measurement.decoder(row)  # loaded again each time, so that memory holds one model at a time
            for batch in config.speed.sizes:
                if row.decoder == "assisted" and batch > 1:
                    continue  # transformers takes one prompt at a time
                rates[row.name].setdefault(str(batch), []).append(_rate(measurement, decoder, batch, number))
    found = {
        name: {batch: {"value": statistics.median(r), "lo": min(r), "hi": max(r)} for batch, r in batches.items()}
        for name, batches in rates.items()
    }
    return {"rows": found, "batch_invariant": _invariance(measurement), "machine": _machine()}


def _machine() -> str:
    """The hardware that was measured."""
    cores = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cores


def _rate(measurement: Measurement, decoder: Decoder, batch: int, number: int) -> float:
    """Tokens a second of one decoding, after one that is not counted."""
    config = measurement.config.text
    prompts = heldout(measurement, batch, config.prompt_tokens, first=2000 + number * ROWS_A_PROMPT * batch)
    decoder.decode(prompts.tokens_RN, config.new_tokens, prompts.seeds)
    started = _now()
    decoder.decode(prompts.tokens_RN, config.new_tokens, prompts.seeds)
    return batch * config.new_tokens / (_now() - started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _invariance(measurement: Measurement) -> dict[str, float]:
    """Seconds a token of one request in an engine of 16 slots, in the usual mode and in the batch-invariant mode."""
    text, config = measurement.config.text, measurement.config
    prompts = heldout(measurement, 1, text.prompt_tokens)
    request = Request(prompts.tokens_RN[0].tolist(), text.new_tokens)
    teacher, found = load_ar(measurement.subject.teacher).to(pick_device()), {}
    for name, invariant in (("plain", False), ("invariant", True)):
        options = EngineConfig(16, text.prompt_tokens + text.new_tokens, batch_invariant=invariant)
        engine, times = Engine(teacher, options), []
        engine.generate([request])
        for _ in range(config.speed.rounds):
            started = _now()
            engine.generate([request])
            times.append((_now() - started) / text.new_tokens)
        found[name] = statistics.median(times)
    return found
