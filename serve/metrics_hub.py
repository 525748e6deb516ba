"""What the replicas of an application share. This module runs in its own process, so it imports nothing heavy."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray


class MetricsHub:
    """An actor that outlives single replicas. It keeps the latest metrics of each, so that one scrape returns those of all,
    and the settings that were served last, so that a new replica can serve those when it cannot load newer ones.

    Args:
        life_s: seconds without a message from any replica after which the actor ends itself: the application has been shut
            down.
    """

    def __init__(self, life_s: float):
        self.latest: dict[str, tuple[float, str]] = {}
        self.served: dict[str, Any] | None = None
        self.life_s, self.last_message = life_s, time.monotonic()
        own = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end_when_alone, args=(own,), daemon=True).start()

    def put(self, replica: str, text: str, served: dict[str, Any] | None) -> list[str]:
        """Store a replica's metrics and settings; return the metrics of all replicas that sent some in the last minute."""
        self.last_message = now = time.monotonic()
        self.served = served or self.served
        self.latest[replica] = (now, text)
        self.latest = {name: (at, kept) for name, (at, kept) in self.latest.items() if now - at < 60}
        return [kept for _, kept in self.latest.values()]

    def last_served(self) -> dict[str, Any] | None:
        """The settings that were served last."""
        self.last_message = time.monotonic()
        return self.served

    def _end_when_alone(self, own: Any) -> None:
        while time.monotonic() - self.last_message < self.life_s:
            time.sleep(self.life_s / 10)
        ray.kill(own)


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
