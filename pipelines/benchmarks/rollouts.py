"""What rollouts and training cost, streaming against cached, in one run on this machine or cluster.

    python -m pipelines.benchmarks.rollouts [--recipe NAME | --config FILE] [section.field=value …]

Trains a short AR teacher and the stages below `student.k` once, then the last stage twice: with rollouts streamed from
the actors while training runs, and with rollouts written to Parquet first. Physics: on a machine where rollouts and
training share cores, streaming cannot beat the sum of both costs; where the pools are separate devices it hides the
cheaper one. *Data wait* is the share of a train worker's time spent waiting for its next batch: near zero means
training is the bottleneck, and rollout actors can be fewer; large means more actors are needed.

A stage measured before in the same output_dir is not run again: give a new one for new figures.
Medians over the log points of a stage, with the smallest and largest. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from typing import Any

import torch

from pipelines.config.command_line import read_command_line
from pipelines.config.overrides import override
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.config.stages import stage_spec
from pipelines.failures import ending_in_one_line
from pipelines.log import show_progress
from pipelines.runs.cluster import connected, work_of_run
from pipelines.runs.costs import training_log
from pipelines.runs.pipeline import Pipeline
from pipelines.runs.stages import locked
from pipelines.tables import spread

DEFAULTS = [
    "teacher.train.steps=60",
    "train.steps=200",
    "eval.blocks=16",
    "student.k=2",
    *(f"stages.k{k}.train.steps=200" for k in (1, 2, 4)),
    "output_dir=runs/benchmark_rollouts",
]


def run(config: Config) -> dict[str, Any]:
    """Both ways of feeding the last stage; returns the record that is printed."""
    name = f"k{config.student.k}"
    if not config.student.design.learns(config.student.k):
        raise ConfigError(f"student.k={config.student.k} has nothing to train under this recipe; choose 2 or more")
    modes: dict[str, Any] = {}
    with locked(config.root, config.recipe), connected(config.root, work_of_run(config), config.wait_for_nodes_s):
        for mode in ("streaming", "cached"):
            chosen = override(config, f"stages.{name}.rollout.cache", mode == "cached")
            with Pipeline(chosen) as pipeline:
                prepared = pipeline.prepare()
                teacher = pipeline.teacher(prepared)
                student = None
                for stage in pipeline.student_stages:
                    student = pipeline.student(stage, prepared, teacher, previous=student)
                if student is not None:
                    modes[mode] = measure(chosen, name, student.fingerprint)
    return {
        "stage": name,
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "corpus_tokens_per_s": round(prepared.facts()["train"]["tokens"] / prepared.facts()["train"]["seconds"]),
        **modes,
    }


def measure(config: Config, name: str, fingerprint: str) -> dict[str, Any]:
    """Figures of a stage from its log, without the first point when there are more."""
    records = training_log(config.root, name, fingerprint)
    records = records[1:] or records
    stage = stage_spec(config, config.student.k)
    result = {
        "train_tokens_per_s": spread([r["tokens_per_s"] for r in records]),
        "data_wait": spread([r["data_wait"] for r in records]),
        "seconds": round(sum(r["seconds"] for r in records), 1),
    }
    tokens_a_row = stage.rollout.windows * stage.rollout.draws * config.student.k
    cache = config.root / name / "rollouts" / "manifest.json"
    if stage.rollout.cache:
        facts = json.loads(cache.read_text())
        result["rollout_tokens_per_s"] = facts["written"] * stage.train.batch * tokens_a_row / facts["seconds"]
        result["cache_seconds"] = facts["seconds"]
    else:
        seconds = [r["rollout_s"] for r in records]
        result["rollout_tokens_per_s"] = tokens_a_row * stage.rollout.actors / statistics.median(seconds)
    return result


def print_table(record: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"\n{record['stage']} on {record['cpus']} CPUs, torch {record['torch']}")
    print(f"{'rollouts':<11}{'rollout tokens/s':>18}{'train tokens/s':>28}{'data wait':>26}{'seconds':>10}")
    for mode in ("streaming", "cached"):
        m = record[mode]
        train, wait = m["train_tokens_per_s"], m["data_wait"]
        print(
            f"{mode:<11}{m['rollout_tokens_per_s']:>18,.0f}"
            f"{train['median']:>12,.0f} [{train['min']:,.0f}, {train['max']:,.0f}]".ljust(58)
            + f"{wait['median']:>9.1%} [{wait['min']:.1%}, {wait['max']:.1%}]{m['seconds']:>9.0f}"
        )
    print(f"cached rollouts took {record['cached']['cache_seconds']:.0f} s to write before training began")


@ending_in_one_line()
def main() -> None:
    """Read the command line, run, print."""
    show_progress()
    record = run(read_command_line(__doc__ or "", defaults=DEFAULTS))
    print_table(record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
