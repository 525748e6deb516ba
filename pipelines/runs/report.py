"""`report.json` for programs, `report.md` with plots and samples for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kforcing.remote import is_uri
from pipelines.evaluation.exact_mode import headline
from pipelines.files import atomic_write, write_json
from pipelines.storage import push

Record = dict[str, Any]


def write_report(root: Path, report: Record, training: dict[str, list[Record]]) -> Path:
    """Write `report.json`, the plots and `report.md`; returns the latter. `training` has each stage's records."""
    write_json(root / "report.json", report)
    plot_match(report["stages"], root / "match.png")
    plot_training(training, root / "training.png")
    push(root / "match.png")
    push(root / "training.png")
    atomic_write(root / "report.md", markdown(report))
    return root / "report.md"


def ratio(figure: Record, digits: int = 3) -> str:
    """A figure with its 95% interval, where it has one; a dash where it is not a finite number."""
    if figure["value"] is None:
        return "–"
    if figure["lo"] is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} [{figure['lo']:.{digits}f}, {figure['hi']:.{digits}f}]"


def bars(figures: list[Record]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach to either side, as matplotlib wants them."""
    values = [math.nan if f["value"] is None else f["value"] for f in figures]
    low = [0.0 if f["lo"] is None else max(0.0, v - f["lo"]) for v, f in zip(values, figures, strict=True)]
    high = [0.0 if f["hi"] is None else max(0.0, f["hi"] - v) for v, f in zip(values, figures, strict=True)]
    return values, [low, high]


def table(stages: list[Record]) -> str:
    """The fidelity table: a row a student and offset."""
    lines = [
        "| student | offset | match | block match | teacher NLL of student's tokens | of its own | target NLL |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in stages:
        for j in range(s["k"]):
            first = j == 0
            lines.append(
                f"| {s['name'] if first else ''} | {j + 1} | {ratio(s['match'][j])} | "
                f"{ratio(s['block_match']) if first else ''} | {ratio(s['student_nll'][j], 2)} | "
                f"{ratio(s['teacher_nll'][j], 2)} | {ratio(s['target_nll'][j], 2)} |"
            )
    return "\n".join(lines)


def cost_table(costs: list[Record]) -> str:
    """What each stage cost: steps, seconds, throughput, waiting, memory."""
    lines = [
        "| stage | steps | seconds | train tokens/s | data wait | rows/s of an actor | worker peak MiB | actor peak MiB | "
        "bottleneck | actors, balanced |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in costs:
        rate = f"{1 / c['rollout_s']:.1f}" if c.get("rollout_s") else "–"
        b = c.get("balance")
        sides = f"{b['bottleneck']} | {b['actors']}, {b['balanced_actors']}" if b else "– | –"
        lines.append(
            f"| {c['name']} | {c['steps']} | {c['seconds']:.0f} | {c['tokens_per_s']:,.0f} | {c['data_wait']:.0%} | {rate} | "
            f"{_memory(c, 'train')} | {_memory(c, 'rollout')} | {sides} |"
        )
    return "\n".join(lines)


def _memory(cost: Record, side: str) -> str:
    """Peak memory of the host, and of the GPU where there is one."""
    if f"{side}_rss_mb" not in cost:
        return "–"
    gpu = cost.get(f"{side}_gpu_mb")
    return f"{cost[f'{side}_rss_mb']:.0f}" + (f" + GPU {gpu:.0f}" if gpu else "")


def markdown(report: Record) -> str:
    """The report for people."""
    samples = []
    for number, record in enumerate(report["samples"], 1):
        samples.append(f"**Prompt {number}.** {quote(record['prompt'])}\n")
        samples += [f"* *{name}*: {quote(text)}" for name, text in record.items() if name != "prompt"]
        samples.append("")
    corpus, exact = report["corpus"], report.get("exact_mode")
    verdict = f"**{headline(exact['student'], exact)}.**\n\n" if exact else ""
    last = report["stages"][-1]["path"]
    rate = corpus["train"]["tokens"] / corpus["train"]["seconds"]
    return f"""# {report["recipe"]}: AR → {" → ".join(f"k={s['k']}" for s in report["stages"])}

{verdict}Corpus: {corpus["train"]["tokens"]:,} train tokens of {corpus["train"]["documents"]} documents, \
{corpus["heldout"]["tokens"]:,} held-out tokens of {corpus["heldout"]["documents"]}. \
Prepared at \
{rate:,.0f} tokens/s. The run that wrote this took {report["seconds"]:.0f} s.

## Fidelity on held-out windows, under the same noise

{table(report["stages"])}

Brackets hold 95% intervals, bootstrapped over documents. *Match* is the share of windows whose token equals the AR
teacher's coupled token; *block match* needs all k. The teacher's NLL is two-sided: a student whose tokens are likelier
than the teacher's own has moved towards modes.

![match by offset](match.png)

## Training

{cost_table(report["costs"])}

![training](training.png)

## The same prompts, the same noise

Every model reads the same uniform noise at the same position; where a student agrees with its teacher token for token,
the text is the same.

{chr(10).join(samples)}
## Look further

* MLflow: `{report["mlflow"]}`
* Load a student: `{"LLM" if is_uri(last) else "PushForwardLM.from_pretrained"}("{last}")`
"""


def print_table(report: dict[str, Any]) -> None:
    """The result on the terminal."""
    print(f"\n{'student':<9}{'match by offset':<28}{'block match [95%]':<26}teacher NLL of student's tokens / its own")
    for s in report["stages"]:
        match = " ".join(f"{m['value']:.3f}" for m in s["match"])
        nll = " ".join(
            f"{a['value']:.2f}/{b['value']:.2f}" for a, b in zip(s["student_nll"], s["teacher_nll"], strict=True)
        )
        print(f"{s['name']:<9}{match:<28}{ratio(s['block_match']):<26}{nll}")
    if exact := report.get("exact_mode"):
        print(f"\n{headline(exact['student'], exact)}")
    print(f"\nMLflow  {report['mlflow']}")


def quote(text: str) -> str:
    """Text on one line that Markdown leaves alone."""
    one_line = " ".join(text.split())
    for sign in "\\`*_[]<>#|":
        one_line = one_line.replace(sign, "\\" + sign)
    return one_line


def plot_match(stages: list[Record], path: Path) -> None:
    """Match by offset, one line a student, with intervals."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for s in stages:
        values, errors = bars(s["match"])
        axes.errorbar(range(1, s["k"] + 1), values, errors, marker="o", capsize=3, label=s["name"])
    axes.set(xlabel="offset in the block", ylabel="match with the AR teacher", ylim=(0, 1.03))
    axes.set_xticks(range(1, max(s["k"] for s in stages) + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_training(log: dict[str, list[Record]], path: Path) -> None:
    """Training loss and block match by step, one line a stage."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, records in log.items():
        steps = [r["step"] for r in records]
        left.plot(steps, [r["loss"] for r in records], label=name)
        right.plot(steps, [r["block_match"] for r in records], label=name)
    # AR training and hard targets are in nats of NLL, soft targets in nats of KL: orders of magnitude apart.
    left.set(xlabel="step", ylabel="loss (nats a token)", yscale="log")
    right.set(xlabel="step", ylabel="block match with the stage's targets", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
