"""The table and the plot of a comparison."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def mean(results: list[dict[str, Any]], k: int, *path: Any) -> tuple[float, float] | None:
    """(mean, half range) of a figure over seeds, or None where it does not exist."""
    values = []
    for result in results:
        value: Any = result["k"].get(str(k), {})
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list):
                value = value[key] if key < len(value) else None
        if value is None or isinstance(value, dict | list):
            return None
        values.append(value)
    return statistics.mean(values), (max(values) - min(values)) / 2


def cell(figure: tuple[float, float] | None, digits: int = 3) -> str:
    """A mean with its half range over seeds, or a dash."""
    if figure is None:
        return "–"
    middle, half = figure
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def table(by_name: dict[str, list[dict[str, Any]]], k: int) -> str:
    """The table of one k."""
    lines = [
        f"| k = {k} | seeds | PFLOP | TV (floor, independent) | entropy (teacher) | KL by offset | "
        "match, inverse CDF: by offset, block | match, Gumbel: by offset, block | trained parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in by_name.items():
        if mean(results, k, "tv") is None:
            continue
        kl = " ".join(cell(mean(results, k, "kl", j)) for j in range(1, k)) if mean(results, k, "kl", 0) else "–"
        if tail := [mean(results, k, "shortlist_tail", j) for j in range(k - 1)] if "shortlist" in name else []:
            kl += f" before the shortlist, which leaves out {' '.join(cell(t) for t in tail)} of the teacher's mass"

        def matches(coupling: str, results: list[dict[str, Any]] = results) -> str:
            if mean(results, k, "block_match", coupling) is None:
                return "–"
            offsets = " ".join(f"{m[0]:.2f}" for j in range(k) if (m := mean(results, k, "match", coupling, j)))
            return f"{offsets}, {cell(mean(results, k, 'block_match', coupling))}"

        flops = mean(results, k, "spent")
        assert flops is not None
        lines.append(
            f"| {name} | {len(results)} | {flops[0] / 1e15:.3f} | "
            f"{cell(mean(results, k, 'tv'))} ({cell(mean(results, k, 'floor'))}, {cell(mean(results, k, 'independent'))}) | "
            f"{cell(mean(results, k, 'entropy'), 2)} ({cell(mean(results, k, 'teacher_entropy'), 2)}) | {kl} | "
            f"{matches('inverse_cdf')} | {matches('gumbel')} | {results[0]['k'][str(k)]['cost']['trained_parameters']:,} |"
        )
    return "\n".join(lines)


def plot(by_name: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Total variation and entropy of every variant measured at k = 4, with their reference lines."""
    rows = [(name, results) for name, results in by_name.items() if mean(results, 4, "tv")][::-1]
    if not rows:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.4 + 0.3 * len(rows)), sharey=True, layout="constrained")
    names = [name for name, _ in rows]

    def values(figure: str) -> list[tuple[float, float]]:
        return [mean(results, 4, figure) or (0.0, 0.0) for _, results in rows]

    tv, entropy, teacher = values("tv"), values("entropy"), values("teacher_entropy")[0][0]
    left.barh(names, [v for v, _ in tv], xerr=[h for _, h in tv], color="tab:blue", alpha=0.8)
    for label, style in (("floor", ":"), ("independent", "--")):
        left.axvline(values(label)[0][0], color="black", linestyle=style, label=label)
    left.set(xlabel="joint total variation to the teacher, k = 4")
    right.barh(names, [v / teacher for v, _ in entropy], color="tab:green", alpha=0.8)
    right.axvline(1, color="black", linestyle=":")
    right.set(xlabel="entropy of the four tokens, share of the teacher's")
    left.legend(frameon=False, loc="lower right")
    left.grid(alpha=0.3, axis="x")
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
    plt.close(figure)
