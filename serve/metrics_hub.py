"""The metrics of all replicas in one place. This module runs in its own process, so it imports nothing heavy."""

from __future__ import annotations

import time


class MetricsHub:
    """An actor that keeps the latest metrics of each replica, so that one scrape returns those of all replicas."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[float, str]] = {}

    def put(self, replica: str, text: str) -> list[str]:
        """Store a replica's metrics; return those of all replicas that sent some within the last minute."""
        now = time.monotonic()
        self.latest[replica] = (now, text)
        self.latest = {name: (at, kept) for name, (at, kept) in self.latest.items() if now - at < 60}
        return [kept for _, kept in self.latest.values()]


def merge(texts: list[str]) -> str:
    """Several texts in Prometheus' format as one: the samples of a metric come together, under one header."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        header: list[str] = []
        samples: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                header, samples = families.setdefault(line, ([], []))
                if not header:
                    header.append(line)
            elif line.startswith("# "):
                if len(header) == 1:
                    header.append(line)
            else:
                samples.append(line)
    return "".join("\n".join([*header, *samples]) + "\n" for header, samples in families.values())
