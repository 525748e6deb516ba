"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a row of names above it; every row has as many cells as there are names."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    assert all(len(line) == len(head) for line in lines), lines
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of several measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
