"""The record of an evaluation: `report.json`, from which tables and plots are made.

results of all parts ─► report_record ─┬─► report.json
                                       ├─► report.md, plots
                                       └─► MLflow
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from kforcing.loading import load_tokenizer
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.decoders import MethodRow, rows_in, slug
from pipelines.evaluation.report.markdown import markdown
from pipelines.evaluation.report.plots import write_plots
from pipelines.evaluation.report.samples_page import write_page
from pipelines.evaluation.subject import Subject
from pipelines.files import atomic_write, read_json, write_json
from pipelines.tracking.pipeline_runs import made_by

Record = dict[str, Any]


def write_evaluation(subject: Subject, config: EvaluationConfig, results: Record, seconds: float) -> Record:
    """Write `report.json`, `report.md` with its plots, and `samples.html`. Returns the content of the first.

    Args:
        results: of all parts by name, and `windows`, the figures on held-out windows by student.
        seconds: that this evaluation took.
    """
    root = Path(subject.root)
    rows = rows_in(root)
    report = report_record(subject, config, rows, results, seconds)
    write_json(root / "report.json", report)
    plots = write_plots(report, config, root)
    write_page(root / "samples.html", subject, rows, results, load_tokenizer(subject.tokenizer))
    atomic_write(root / "report.md", markdown(report, config, subject, plots))
    return report


def report_record(
    subject: Subject, config: EvaluationConfig, rows: list[MethodRow], results: Record, seconds: float
) -> Record:
    """All figures of an evaluation."""
    cost = cost_record(subject, rows, results)
    return {
        "name": subject.name,
        "seconds": round(seconds, 1),
        "machine": results["speed"]["machine"],
        "config": dataclasses.asdict(config),
        "rows": [row_record(row, results, cost) for row in rows],
        "windows": results["windows"],
        "joint": _by_student(results, "joint-", subject),
        "free": _by_student(results, "free-", subject),
        "determinism": {n.removeprefix("determinism-"): r for n, r in results.items() if n.startswith("determinism-")},
        "frontier": results.get("frontier", []),
        "mauve": results.get("mauve", {}),
        "judge": results.get("judge", {}),
        "references": {k: v for k, v in results["references"].items() if k not in ("texts", "again", "prompts")},
        "batch_invariant": results["speed"]["batch_invariant"],
        "cost": cost,
        "gen_ppl_again": results.get("gen-ppl-1", {}).get("AR again"),
    }


def _by_student(results: Record, prefix: str, subject: Subject) -> Record:
    return {f"{s.name} at k={k}": results[f"{prefix}{s.name}-at-{k}"] for s, k in subject.pairs}


def row_record(row: MethodRow, results: Record, cost: Record) -> Record:
    """One row of the main table: quality, passes, speed, training FLOPs. A student of the run also has its fidelity."""
    record = {k: v for k, v in results[f"row-{slug(row.name)}"].items() if k != "tokens"}
    ppl = {**results.get("gen-ppl-1", {}), **results.get("gen-ppl-2", {})}.get(row.name)
    name = row.name.removeprefix("this run, ")
    student, _, k = name.replace(", exact", "").partition(" at k=")
    training = results[f"train-{row.method}"] if row.method else {"flops": cost["spent"].get(student, 0.0)}
    record = {
        "name": row.name,
        **record,
        "gen_ppl": ppl,
        "tokens_per_s": results["speed"]["rows"][row.name],
        "training": training,
        "own": bool(row.path),
        "judge": results.get("judge", {}).get(row.name),
    }
    if row.path and not row.exact:
        at = f"{student}-at-{k}"
        record |= {"windows": results["windows"][name], "next_k": results[f"joint-{at}"], "free": results[f"free-{at}"]}
    return record


def cost_record(subject: Subject, rows: list[MethodRow], results: Record) -> Record:
    """What the run's training took, what each token saves, and after how many tokens the two are equal.

    A student is charged for its own stage and for those before it. It is compared with the AR model under the same
    coupling. Times are those for which GPUs were held or, without GPUs, the time of the machine.
    """
    stages, seconds = results["cost"]["stages"], _stage_seconds(subject)
    for stage in stages:
        stage |= seconds.get(stage["name"], {})
    upto = {s.path: [stage for stage in stages if 0 < stage["k"] <= s.k] for s in subject.students}
    spent = {path: sum(s["rollouts"] + s["train"] for s in some) for path, some in upto.items()}
    decoding, rates, savings = results["cost"]["decoding"], results["speed"]["rows"], []
    ar_flops = decoding[0]["flops_a_token"]
    flops = {f"this run, {entry['name']} at k={entry['k']}": entry["flops_a_token"] for entry in decoding}
    ar_rates = {row.coupling: rates[row.name] for row in rows if row.decoder == "ar"}
    for row in (row for row in rows if row.path and row.k > 1 and not row.exact):
        line: Record = {"name": row.name, "flops_a_token": flops[row.name] / ar_flops, "flops": spent[row.path]}
        line["even_flops"] = break_even(spent[row.path], ar_flops - flops[row.name])
        spent_s = sum(s.get("device_s", math.nan) for s in upto[row.path])
        for batch, rate in ar_rates[row.coupling].items():
            saved = 1 / rate["value"] - 1 / rates[row.name][batch]["value"]
            line[f"saved_s_{batch}"], line[f"even_{batch}"] = saved, break_even(spent_s, saved)
        savings.append(line)
    return {
        "stages": stages,
        "flops": results["cost"]["flops"],
        "spent": {student.name: spent[student.path] for student in subject.students},
        "ar_flops_a_token": ar_flops,
        "savings": savings,
    }


def break_even(spent: float, saved: float) -> float | str:
    """Number of tokens after which the savings of each token equal what was spent; or `never`, or `unknown`."""
    if math.isnan(spent):
        return "unknown"
    return spent / saved if saved > 0 else "never"


def _stage_seconds(subject: Subject) -> dict[str, Record]:
    """Measured times of the run's stages, from the run's own report.

    `wall_s` is the whole stage, `trainer_s` and `rollout_s` the work of all trainers and rollout actors, `device_s` the time
    for which GPUs were held (without GPUs, that of the machine). The dictionary is empty where the run's report is not
    here, as for most registered models.
    """
    run, found = subject.run, {}
    root = run.root
    report = read_json(root / "report.json")
    if not report or made_by(root).get("parent") != subject.parent:
        return {}
    specs = {spec.name: spec for spec in run.students}
    for cost in report["costs"]:
        stage = specs.get(cost["name"])
        train = stage.train if stage else run.teacher.config.train
        rollout = stage.rollout if stage else run.teacher.rollout
        cached = rollout.cache
        times = {"wall_s": cost["seconds"], "trainer_s": cost["seconds"] * (1 - cost["data_wait"]) * train.workers}
        held_s = cost["seconds"] * train.workers * train.gpus_per_worker
        if "rollout_s" in cost:
            times["rollout_s"] = cost["rollout_s"] * train.batch * cost["steps"]
            if cached:  # cached rollouts are made once, before training
                times["rollout_s"] /= rollout.cache_epochs
                times["wall_s"] += times["rollout_s"] / rollout.actors
            held_s += rollout.gpus_per_actor * (times["rollout_s"] if cached else cost["seconds"] * rollout.actors)
        times["device_s"] = held_s or times["wall_s"]
        found[cost["name"]] = times
    return found
