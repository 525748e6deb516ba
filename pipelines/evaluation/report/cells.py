"""Figures as the cells of tables."""

from __future__ import annotations

from typing import Any

from pipelines.runs.report import ratio

Record = dict[str, Any]


def interval(figure: Record | None, digits: int = 2) -> str:
    """A figure with its interval, or a dash."""
    return ratio(figure, digits) if figure else "–"


def value(figure: Record | None) -> str:
    """A figure without its interval, or a dash."""
    return f"{figure['value']:.2f}" if figure else "–"


def rate(figure: Record | None) -> str:
    """A rate as a whole number with its interval, or a dash."""
    return f"{figure['value']:,.0f} [{figure['lo']:,.0f}, {figure['hi']:,.0f}]" if figure else "–"


def flops(number: float) -> str:
    """FLOPs with three digits and a prefix."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number / 1e6:.3g} M" if number else "0"


def count(tokens: float | str) -> str:
    """A number of tokens, or the word that stands for it."""
    return tokens if isinstance(tokens, str) else f"{tokens:,.0f}"
