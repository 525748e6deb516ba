"""Figures of all replicas in one place. Imports nothing heavy: it runs in a process of its own."""

from __future__ import annotations

import time


class MetricsHub:
    """Keeps the latest figures of each replica, so that one scrape sees all. Runs as an actor."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[float, str]] = {}

    def put(self, replica: str, text: str) -> list[str]:
        """Remember a replica's figures; returns those of all that were heard of in the last minute."""
        now = time.monotonic()
        self.latest[replica] = (now, text)
        self.latest = {name: (at, kept) for name, (at, kept) in self.latest.items() if now - at < 60}
        return [kept for _, kept in self.latest.values()]


def merge(texts: list[str]) -> str:
    """Several expositions of the same metrics, told apart by labels, as one."""
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
