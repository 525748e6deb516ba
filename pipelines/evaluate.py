"""Evaluate the models of a run: fidelity, text, every baseline in one table, speed, cost, determinism.

    run directory or models:/NAME@ALIAS ─► parts, each finished once ─► report.md, report.json, plots, samples.html ─► MLflow
        fidelity   the same noise, joint distributions, far from the prompt        (held-out text, intervals over documents)
        baselines  other methods trained under one budget, decoded, judged alike
        speed      tokens a second, alone on the machine

    python pipelines/evaluate.py [RUN | models:/NAME@ALIAS] [section.field=value …]

Without arguments: `runs/toy`. Run the same command again to continue an interrupted evaluation; finished parts are
kept, and a changed setting reruns what depends on it. The last line is one JSON object. `--help` lists every field.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from pipelines.config.fingerprint import fingerprint
from pipelines.config.help import describe_fields
from pipelines.config.section import ConfigError
from pipelines.data.tokenise import Prepared
from pipelines.evaluation.config import EvaluationConfig, evaluation_config
from pipelines.evaluation.heldout import EvalJob, evaluate_student
from pipelines.evaluation.parts import run_parts
from pipelines.evaluation.plan import plan_of
from pipelines.evaluation.report.record import write_evaluation
from pipelines.evaluation.subject import Subject, open_subject, subject_of
from pipelines.failures import ending_in_one_line
from pipelines.log import belonging, log, show_progress
from pipelines.runs.cluster import READING, Pool, Work, connected
from pipelines.runs.stages import hold, open_stage, run_id
from pipelines.tracking.evaluation_log import log_evaluation
from pipelines.tracking.mlflow_client import tracking_uri


def evaluate(target: str, config: EvaluationConfig) -> dict[str, Any]:
    """Measure what is not measured yet and write the report; returns its key figures."""
    started = time.monotonic()
    run, root = open_subject(target, config)
    plan = plan_of(run, config)
    busy = f"{root} is in use by another evaluation; wait for it or choose another output_dir"
    with (
        hold(root, busy),
        belonging(run=run_id(run.root) or run.root.name),
        connected(root, work_of(config), config.wait_for_nodes_s),
    ):
        subject = subject_of(target, run, root, config)
        windows = same_noise(subject, config)
        results = run_parts(plan(subject), root, config.cpus, config.gpus, alone_cpus(config))
    results["windows"] = windows
    report = write_evaluation(subject, config, results, time.monotonic() - started)
    uri = config.tracking.uri or subject.tracking or tracking_uri(run.tracking.uri, run.root.parent)
    if uri != "off":
        log_evaluation(uri, config.tracking.experiment, subject.parent, root, report)
    return {"path": str(root / "report.json"), "parts": len(results), "seconds": round(time.monotonic() - started, 1)}


def same_noise(subject: Subject, config: EvaluationConfig) -> dict[str, Any]:
    """Match and NLLs of every student and k on held-out windows, as a Ray Data job each."""
    settings = dataclasses.replace(
        subject.run.eval,
        actors=1,
        cpus_per_actor=config.cpus,
        gpus_per_actor=config.gpus,
        blocks=config.fidelity.blocks,
        windows=config.fidelity.windows,
        bootstrap=config.bootstrap,
    )
    found = {}
    for student, k in subject.pairs:
        name = f"windows-{student.name}-at-{k}"
        job = EvalJob(subject.teacher, student.path, k, settings.windows, config.seed, settings.batch)
        stage = open_stage(
            Path(subject.root), name, fingerprint(subject.id, name, config.fidelity, config.bootstrap, config.seed)
        )
        with belonging(stage=name):
            log.info(f"{name:<36}{'finished before' if stage.manifest else 'scoring'}")
            found[f"{student.name} at k={k}"] = evaluate_student(
                stage, Prepared(Path(subject.heldout).parent), job, settings
            )
    return found


def work_of(config: EvaluationConfig) -> Work:
    """What the cluster must have room for."""
    scoring = {"a scoring actor": Pool(1, config.cpus, config.gpus)} | READING
    return {"held-out scoring": scoring, "a measurement of speed": {"it": Pool(1, config.speed.cpus, config.gpus)}}


def alone_cpus(config: EvaluationConfig) -> float:
    """CPUs of a measurement of speed: by default all that a node with the GPUs it wants has."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0.0) >= config.gpus]
    return config.speed.cpus or max(node.get("CPU", 1.0) for node in nodes)


@ending_in_one_line()
def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"fields:\n{describe_fields(EvaluationConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RUN | models:/NAME@ALIAS | section.field=value")
    words = parser.parse_args().words
    show_progress()
    targets = [word for word in words if "=" not in word]
    if len(targets) > 1:
        raise ConfigError(f"one run at a time, found {' and '.join(targets)}")
    config = evaluation_config([word for word in words if "=" in word])
    print(json.dumps(evaluate(targets[0] if targets else "runs/toy", config)))


if __name__ == "__main__":
    main()
