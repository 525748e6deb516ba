"""The way of metrics from train workers to the driver: an actor, whose process imports nothing else."""

from __future__ import annotations

from typing import Any


class Relay:
    """A mailbox between train workers and the driver. It runs as an actor."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.steps = 0

    def beat(self) -> None:
        """Note that the workers have begun, or that steps have been made since the last call."""
        self.steps += 1

    def count(self) -> int:
        """How often that was noted."""
        return self.steps

    def put(self, record: dict[str, Any]) -> None:
        """Add a record."""
        self.records.append(record)

    def drain(self) -> list[dict[str, Any]]:
        """Return all records and forget them."""
        taken, self.records = self.records, []
        return taken
