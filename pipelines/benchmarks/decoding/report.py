"""What is written of a benchmark: tables with the checks below them, a plot, `benchmark.json`, and a run in MLflow."""

from __future__ import annotations

import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.benchmarks.decoding.rounds import DecodingRound
from pipelines.benchmarks.decoding.ways import AR
from pipelines.tables import markdown_table

Record = dict[str, Any]
TRANSFORMERS = "transformers"
EXACT = "engine, exact k="
AUTO = f"{EXACT}auto"


def rows_record(rounds: dict[str, list[DecodingRound]], rooflines: dict[str, float]) -> Record:
    """Figures of each way of decoding, one a round."""
    return {
        name: {
            "step_ms": [r.step_ms for r in some],
            "tokens_a_step": [r.tokens_a_step for r in some],
            "tokens_per_s": [r.tokens_per_s for r in some],
            "roofline_ms": rooflines.get(name),
        }
        for name, some in rounds.items()
    }


def ratio(rows: Record, mine: str, other: str, figure: str = "tokens_per_s") -> list[float]:
    """One way's figure over another's, round by round."""
    return [a / b for a, b in zip(rows[mine][figure], rows[other][figure], strict=True)]


def spread_of(values: list[float], digits: int) -> str:
    """Median [smallest, largest]."""
    median, *ends = (f"{x:,.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} [{', '.join(ends)}]"


def title(table: Record) -> str:
    """Batch, context, temperature, and acceptance where it was simulated."""
    said = f"batch {table['batch']}, context {table['context']}, T = {table['temperature']:g}"
    return said if table["acceptance"] is None else f"{said}, acceptance {table['acceptance']:g}"


def describe(table: Record) -> str:
    """A table and its checks in Markdown."""
    rows = table["rows"]
    head = [title(table), "ms a step", "tokens a step", "tokens/s", "× engine AR", "× transformers"]
    lines = []
    for name, row in rows.items():
        floor, ms = row["roofline_ms"], statistics.median(row["step_ms"])
        lines.append(
            [
                name,
                spread_of(row["step_ms"], 2),
                spread_of(row["tokens_a_step"], 2),
                spread_of(row["tokens_per_s"], 0),
                spread_of(ratio(rows, name, AR), 2),
                f"{statistics.median(ratio(rows, name, TRANSFORMERS)):.2f}",
                f"{floor:.2f}, {floor / ms:.0%} of the step" if floor else "–",
            ]
        )
    return "\n".join([markdown_table([*head, "roofline, ms"], lines), "", *checks(rows)])


def checks(rows: Record) -> list[str]:
    """What exact mode should hold: a bounded step, and a chosen width that loses neither to AR nor to a fixed width."""
    exact = [name for name in rows if name.startswith(EXACT)]
    widths = [name for name in exact if name.removeprefix(EXACT).isdigit()]
    lines = [f"* {name}: {spread_of(ratio(rows, name, AR, 'step_ms'), 2)} × the AR step." for name in widths]
    if AUTO in rows:
        line = f"* {AUTO}: {spread_of(ratio(rows, AUTO, AR), 2)} × AR"
        if widths:
            best = max(widths, key=lambda name: statistics.median(rows[name]["tokens_per_s"]))
            line += f", {spread_of(ratio(rows, AUTO, best), 2)} × {best}, the best fixed width"
        lines.append(f"{line}.")
    return lines


def physics(record: Record) -> str:
    """The machine and the model, for people."""
    m, v = record["machine"], record["versions"]
    return (
        f"{m['gpu'] or m['cpu']}, {m['cores']} cores: reads {m['gb_per_s']:.1f} GB/s, computes {m['gflop_per_s']:,.0f} "
        f"GFLOP/s ({record['dtype']}); torch {v['torch']}, transformers {v['transformers']}; {record['model']}, "
        f"{record['parameters'] / 1e6:.0f} M parameters; coupling {record['coupling']}. Medians over rounds [smallest, "
        "largest]."
    )


def write_results(folder: Path, record: Record) -> None:
    """`benchmark.json` and `benchmark.md`, with all rounds so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(record, indent=1))
    tables = [describe(table) for table in record["tables"]]
    (folder / "benchmark.md").write_text("\n\n".join([physics(record), *tables]) + "\n")


def draw_frontier(path: Path, record: Record) -> None:
    """Tokens a second of one prompt against those of the whole batch, a line for each way, at the first temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = record["tables"][0]
    same = ("context", "temperature", "acceptance")
    tables = [table for table in record["tables"] if all(table[name] == first[name] for name in same)]
    figure, axes = plt.subplots(figsize=(9, 5.5))
    colours = plt.get_cmap("tab20")
    for i, name in enumerate(dict.fromkeys(name for table in tables for name in table["rows"])):
        some = [table for table in tables if name in table["rows"]]
        rates = [statistics.median(table["rows"][name]["tokens_per_s"]) for table in some]
        alone = [rate / table["batch"] for rate, table in zip(rates, some, strict=True)]
        style = "-" if name.startswith("engine") else ":"
        axes.plot(alone, rates, style, marker="o", label=name, color=colours(i % 20))
    axes.set(xscale="log", yscale="log", xlabel="tokens/s of one prompt", ylabel="tokens/s of the whole batch")
    axes.set_title(title(first).partition(", ")[2], fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def track(uri: str | None, folder: Path, record: Record) -> None:
    """Log figures and files to MLflow, where it is installed. Where it cannot be reached, say so and go on."""
    if uri == "off" or find_spec("mlflow") is None:
        return
    try:
        from pipelines.tracking.mlflow_client import log_report

        params = {"model": record["model"], "dtype": record["dtype"], **record["machine"], **record["versions"]}
        metrics = {
            f"{_slug(name)}/{_slug(title(table))}/{figure}": statistics.median(row[figure])
            for table in record["tables"]
            for name, row in table["rows"].items()
            for figure in ("tokens_per_s", "step_ms", "tokens_a_step")
        }
        log_report(uri, "kforcing-benchmark", folder, params, metrics)
    except Exception as error:  # the figures are on disk and printed: nothing is lost
        print(f"warning: not logged to MLflow: {error}", file=sys.stderr)


def _slug(name: str) -> str:
    """A name as MLflow takes it."""
    return name.replace(", ", "_").replace(" ", "_").replace("=", "").replace("'", "")
