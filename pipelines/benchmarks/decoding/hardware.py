"""What this machine does at its best, measured, and the least time that a step can take on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kforcing.metrics.flops import attention_step, predicted_ar_step, predicted_step
from pipelines.benchmarks.decoding.ways import DecodingWay


@dataclass(frozen=True)
class Hardware:
    """The rates that bound a step."""

    bytes_per_s: float
    flops_per_s: float


def measure_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Bandwidth of reading memory that no cache holds, and arithmetic of a large matrix product."""
    big = torch.zeros(2**27 if device.type == "cpu" else 2**30, dtype=dtype, device=device)
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = [min(timed(call, device) for _ in range(7)) for call in (lambda: big.sum(), lambda: a @ a)]
    return Hardware(big.nbytes / seconds[0], 2 * n**3 / seconds[1])


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, with all work that it queues on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Return when the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def roofline_ms(way: DecodingWay, backbone: Any, batch: int, context: int, hardware: Hardware) -> float:
    """The least milliseconds of a step: the larger of (its bytes ÷ bandwidth) and (its FLOPs ÷ arithmetic)."""
    entries = 1
    step = predicted_ar_step(backbone)
    if way.student:
        step = predicted_step(way.student, way.k, way.exact)
        entries = way.k if way.student.design.conditional else 2 * way.k
    attention = attention_step(backbone, entries, context)
    seconds = max(
        (step.bytes + batch * attention.bytes) / hardware.bytes_per_s,
        batch * (step.flops + attention.flops) / hardware.flops_per_s,
    )
    return seconds * 1e3


def describe_hardware(device: torch.device, hardware: Hardware) -> dict[str, Any]:
    """Names and rates, for records."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "gb_per_s": hardware.bytes_per_s / 1e9,
        "gflop_per_s": hardware.flops_per_s / 1e9,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
