"""The device of this process, and the most memory it has used."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def pick_device() -> torch.device:
    """The GPU Ray gave this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would count what the process that started this one had needed
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_gpu_mb() -> float:
    """Most memory that torch has had in use on this process's GPU so far, in MiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20
