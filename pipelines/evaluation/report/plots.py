"""The plots of `report.md`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from pipelines.evaluation.baselines import METHODS
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.report.cells import Record
from pipelines.runs.report import bars

# Colours that most colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]


def write_plots(report: Record, config: EvaluationConfig, root: Path) -> list[str]:
    """Write all plots to a folder. Returns their names without `.png`."""
    plot_windows(report["windows"], root / "match.png")
    plot_free(report["free"], root / "distance.png")
    plot_baselines(report["rows"], report["references"]["joint"]["tv"]["value"], config, root / "baselines.png")
    if not report["frontier"]:
        return ["match", "distance", "baselines"]
    plot_frontier(report, config, root / "frontier.png")
    return ["match", "distance", "baselines", "frontier"]


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_windows(windows: Record, path: Path) -> None:
    """Match by offset on held-out windows: one line for each student and k."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for colour, (name, f) in zip(COLOURS * 3, windows.items(), strict=False):
        values, errors = bars(f["match"])
        shift = 0.03 * (list(windows).index(name) - len(windows) / 2)
        places = [j + 1 + shift for j in range(len(values))]
        axes.errorbar(places, values, errors, marker="o", capsize=2, label=name, color=colour)
    axes.set(xlabel="offset in the block", ylabel="same token as the AR model", ylim=(0, 1.03))
    axes.set_xticks(range(1, max(len(f["match"]) for f in windows.values()) + 1))
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_free(free: Record, path: Path) -> None:
    """Match given the text so far, gap of NLLs, and equality of the texts, by distance from the prompt."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
    for colour, (name, f) in zip(COLOURS * 3, free.items(), strict=False):
        for axes, key in ((left, "match"), (right, "same")):
            values, errors = bars(f[key])
            axes.errorbar(f["upto"], values, errors, marker="o", markersize=3, capsize=2, label=name, color=colour)
        gap = [a["value"] - b["value"] for a, b in zip(f["decoder_nll"], f["teacher_nll"], strict=True)]
        middle.plot(f["upto"], gap, marker="o", markersize=3, color=colour, label=name)
    left.set(ylabel="same token as AR, given the text so far", ylim=(0, 1.03))
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(ylabel="NLL of its tokens − of AR's own (nats)")
    right.set(ylabel="text is still AR's", ylim=(0, 1.03))
    for axes in (left, middle, right):
        axes.set_xlabel("tokens from the prompt")
    left.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_baselines(rows: list[Record], floor: float, config: EvaluationConfig, path: Path) -> None:
    """Quality (joint total variation) against speed: one panel for each batch size."""
    batches = [str(b) for b in config.speed.sizes]
    width = 6.2 * len(batches)
    figure, panels = plt.subplots(1, len(batches), figsize=(width, 4.8), layout="constrained", squeeze=False)
    shown = [r for r in rows if "joint" in r]
    for axes, batch in zip(panels[0], batches, strict=True):
        axes.axhline(floor, color="grey", linewidth=0.8, linestyle="--", label="two samples of the AR model")
        _marks(axes, shown, [(r["tokens_per_s"][batch]["value"], r["joint"]["tv"]["value"]) for r in shown], config)
        axes.set(xlabel=f"tokens/s, batch {batch}", ylabel="joint TV to AR, next 4 tokens (lower is better)")
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    _legend_beside(panels[0][-1])
    figure.suptitle("Numbers are tokens a step", fontsize=9)
    _save(figure, path)


def plot_frontier(report: Record, config: EvaluationConfig, path: Path) -> None:
    """Gen-PPL against entropy: temperatures of AR and the last student as lines, every row as a mark."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    rows = [r for r in report["rows"] if r["gen_ppl"] and r["entropy"]]
    _marks(axes, rows, [(r["entropy"]["value"], r["gen_ppl"]["value"]) for r in rows], config)
    for colour, (name, points) in zip(("#000000", "#D55E00"), _temperature_lines(report).items(), strict=False):
        row = next(r for r in report["rows"] if r["name"] == name)
        points = sorted([*points, (row["entropy"]["value"], row["gen_ppl"]["value"], "")])
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "-",
            color=colour,
            linewidth=1,
            label=f"{name}, temperatures",
        )
        for x, y, text in points:
            axes.annotate(text, (x, y), fontsize=7, xytext=(4, -9), textcoords="offset points", color=colour)
    axes.set(xlabel="entropy of a text's tokens (nats)", ylabel="Gen-PPL under the external LM", yscale="log")
    _plain_log(axes.yaxis)
    _legend_beside(axes)
    _save(figure, path)


def _temperature_lines(report: Record) -> dict[str, list[tuple[float, float, str]]]:
    """(entropy, Gen-PPL, label) of the other temperatures, by the name of the row that has temperature 1."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for p in report["frontier"]:
        if p["gen_ppl"] and p["entropy"]:
            ar = "AR, engine, Gumbel" if p["coupling"] == "gumbel" else "AR, engine"
            name = ar if p["name"] == "AR" else f"this run, {p['name']} at k={p['k']}"
            point = p["entropy"]["value"], p["gen_ppl"]["value"], f"T={p['temperature']}"
            lines.setdefault(name, []).append(point)
    return lines


def _marks(axes: Any, rows: list[Record], places: list[tuple[float, float]], config: EvaluationConfig) -> None:
    """A mark for each row with its tokens a step beside it; each method has its own colour and shape."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for row, (x, y) in zip(rows, places, strict=True):
        i, own = kinds.index(_kind(row)), row["own"]
        label = METHODS[row["method"]].label if row["method"] else _kind(row)
        if own:
            label = f"this run, {1 / config.baselines.share:.3g}× the budget"
        style = {"color": COLOURS[i % 7], "marker": "os^Dv"[i // 7 % 5], "fillstyle": "none" if own else "full"}
        axes.plot(x, y, linestyle="none", markersize=6, label=label, **style)
        axes.annotate(f" {row['k']}" if row["k"] else "", (x, y), fontsize=7)


def _kind(row: Record) -> str:
    return row["method"] or row["name"].split(",")[0]


def _legend_beside(axes: Any) -> None:
    """One entry for each label, to the right of the axes."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _plain_log(axis: Any) -> None:
    """Whole numbers instead of powers of ten on a logarithmic axis."""
    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_tick_params(which="both", labelsize=7)
