"""`report.json` for programs, `report.md` with plots and samples for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pipelines.files import atomic_write, write_json
from pipelines.tracking.tracker import LOG

Record = dict[str, Any]


def write_report(root: Path, report: Record, training: dict[str, list[Record]]) -> Path:
    """Write `report.json`, the plots and `report.md`; returns the latter. `training` has each stage's records."""
    write_json(root / "report.json", report)
    plot_match(report["stages"], root / "match.png")
    plot_training(training, root / "training.png")
    atomic_write(root / "report.md", markdown(report))
    return root / "report.md"


def training_log(root: Path, stage: str, fingerprint: str) -> list[Record]:
    """The training records of one stage in order; of a step seen twice (resumed runs) the later one."""
    steps: dict[int, Record] = {}
    for line in (root / LOG).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if (record.get("event"), record.get("stage"), record.get("fingerprint")) == ("train", stage, fingerprint):
            steps[record["step"]] = record
    return [steps[step] for step in sorted(steps)]


def ratio(figure: Record, digits: int = 3) -> str:
    """A figure with its 95% interval, where it has one."""
    if figure["lo"] is None:
        return f"{figure['value']:.{digits}f}"
    return f"{figure['value']:.{digits}f} [{figure['lo']:.{digits}f}, {figure['hi']:.{digits}f}]"


def bars(figures: list[Record]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach to either side, as matplotlib wants them."""
    values = [f["value"] for f in figures]
    low = [0.0 if f["lo"] is None else max(0.0, f["value"] - f["lo"]) for f in figures]
    high = [0.0 if f["hi"] is None else max(0.0, f["hi"] - f["value"]) for f in figures]
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


def balance(rollout_s: float, actors: int, step_s: float, rows: int) -> Record:
    """Which side of a streaming stage holds up the other, and how many rollout actors would make them equally fast.

    More actors are taken to make more rows: that is so where they and the train workers share no device, and not on one
    machine whose cores are all in use.

    Args:
        rollout_s: seconds that one actor takes for a row.
        actors: rollout actors.
        step_s: seconds of a training step, without those it waited for rows.
        rows: rows of a step, over all workers.
    """
    made, used = actors / rollout_s, rows / step_s
    return {
        "rollout_rows_per_s": made,
        "train_rows_per_s": used,
        "bottleneck": "rollouts" if made < used else "training",
        "actors": actors,
        "balanced_actors": math.ceil(rollout_s * used),
    }


def balance_line(cost: Record) -> str:
    """A stage's balance in words."""
    b = cost["balance"]
    actors = f"{b['actors']} rollout actors make" if b["actors"] > 1 else "1 rollout actor makes"
    return (
        f"{actors} {b['rollout_rows_per_s']:.1f} rows/s, training could use {b['train_rows_per_s']:.1f} and waited "
        f"{cost['data_wait']:.0%} of its time: the bottleneck is {b['bottleneck']}, "
        f"rollout.actors={b['balanced_actors']} would balance them, given devices of their own"
    )


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
    corpus = report["corpus"]
    rate = corpus["train"]["tokens"] / corpus["train"]["seconds"]
    return f"""# {report["recipe"]}: AR → {" → ".join(f"k={s['k']}" for s in report["stages"])}

Corpus: {corpus["train"]["tokens"]:,} train tokens of {corpus["train"]["documents"]} documents, \
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
* Load a student: `PushForwardLM.from_pretrained("{report["stages"][-1]["path"]}")`
"""


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
