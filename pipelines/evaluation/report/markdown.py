"""`report.md`: the order of its sections, and the text around its tables."""

from __future__ import annotations

from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.report.cells import Record
from pipelines.evaluation.report.legend import legend, reported_table
from pipelines.evaluation.report.tables import (
    baselines_table,
    flips_table,
    free_table,
    joint_table,
    precision_table,
    savings_table,
    text_table,
    training_table,
    windows_table,
)
from pipelines.evaluation.subject import Subject


def markdown(report: Record, config: EvaluationConfig, subject: Subject, plots: list[str]) -> str:
    """The report for people. `plots` holds the names of the plots that were written."""
    cost, invariant = report["cost"], report["batch_invariant"]
    plain_ms, invariant_ms = invariant["plain"] * 1e3, invariant["invariant"] * 1e3
    sections = [
        f"# Evaluation of {subject.name}",
        f"This report compares {len(report['rows'])} ways to decode. They were measured in {report['seconds']:.0f} s, "
        "without parts that were finished before. Brackets hold 95% intervals, bootstrapped over documents, unless the text "
        "says otherwise. Every figure was measured here unless it is marked as reported.",
        "## All baselines in one table",
        baselines_table(report, config),
        legend(report, config),
        "![quality against speed](baselines.png)",
        reported_table(config),
        "## Fidelity under the same noise",
        windows_table(report["windows"]),
        "![match by offset](match.png)",
        "### The joint distribution of the next k tokens",
        joint_table(report["joint"], subject),
        "### Far from the prompt",
        free_table(report["free"]),
        "![fidelity by distance from the prompt](distance.png)",
        "## Text",
        text_table(report, config),
        "[Texts side by side with their first differences marked](samples.html)",
        "![frontier](frontier.png)" if "frontier" in plots else "",
        "## Cost",
        training_table(cost),
        savings_table(cost),
        f"The AR model needs {cost['ar_flops_a_token'] / 1e6:.2f} MFLOP a token. *Even* is the number of generated tokens "
        "after which decoding has saved what the student's stages took. It is *never* where a token costs more than the AR "
        "model's, and *unknown* where the time of a stage was not measured.",
        "## Determinism",
        flips_table(report["determinism"]),
        precision_table(report["determinism"]),
        f"One request alone in 16 slots takes {plain_ms:.2f} ms a token, and {invariant_ms:.2f} ms in batch-invariant mode "
        f"({invariant_ms / plain_ms:.1f}×). When all slots are in use, the batch-invariant mode computes the same as the "
        "usual mode.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
