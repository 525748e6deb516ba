"""Distil an AR language model into a push-forward model, stage by stage.

    corpus ─► token blocks ─► AR teacher ─► PFLM(1) ─► PFLM(2) ─► PFLM(4) … ─► evaluation ─► report
                                  each stage: rollouts by the frozen teacher ─► training ─► next stage's teacher

    python pipelines/distill.py [--plan] [--recipe NAME | --config FILE] [section.field=value …]

Without arguments: recipe `quickstart` (a student of SmolLM2-135M-Instruct) on an embedded Ray. Run the same command again to
continue an interrupted run; finished stages are skipped. `--plan` starts nothing, and prints parameters, FLOPs, hours,
memory and disk of each stage; `--flops-per-s 4e14` says how fast all devices are together (1e11 are two CPU cores).
`--help` lists every field.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from kforcing.remote import address
from pipelines.config.command_line import read_command_line
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.failures import ending_in_one_line
from pipelines.log import show_progress
from pipelines.runs.cluster import connected, work_of_run
from pipelines.runs.pipeline import Pipeline
from pipelines.runs.plan import describe_plan
from pipelines.runs.stages import locked


def distill(config: Config) -> Path:
    """Run the whole pipeline and return the path of its report."""
    started = time.monotonic()
    with (
        locked(config.root, config.recipe),
        connected(config.root, work_of_run(config), config.wait_for_nodes_s),
        Pipeline(config) as pipeline,
    ):
        prepared = pipeline.prepare()
        teacher = pipeline.teacher(prepared)
        student = None
        for stage in pipeline.student_stages:
            student = pipeline.student(stage, prepared, teacher, previous=student)
        return pipeline.report(prepared, teacher, seconds=time.monotonic() - started)


def read_plan_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--plan` and its speed, and the words that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--flops-per-s", type=float)
    options, left = parser.parse_known_args(words)
    if options.flops_per_s is not None and not options.plan:
        raise ConfigError(f"--flops-per-s {options.flops_per_s:g} belongs to --plan; add --plan, or leave it out")
    options.flops_per_s = 1e11 if options.flops_per_s is None else options.flops_per_s
    if not 0 < options.flops_per_s < float("inf"):
        raise ConfigError(f"--flops-per-s {options.flops_per_s}: give the trainers' FLOP/s, for example 1e11")
    return options, left


@ending_in_one_line()
def main() -> None:
    """Read the command line, and run or plan."""
    show_progress()
    plan, words = read_plan_options(sys.argv[1:])
    config = read_command_line(__doc__ or "", words)
    if plan.plan:
        print(describe_plan(config, plan.flops_per_s))
    else:
        print(f"report  {address(distill(config))}")


if __name__ == "__main__":
    main()
