"""Distil an AR language model into a push-forward model, stage by stage.

    corpus ─► token blocks ─► AR teacher ─► PFLM(1) ─► PFLM(2) ─► PFLM(4) … ─► evaluation ─► report
                                  each stage: rollouts by the frozen teacher ─► training ─► next stage's teacher

    python pipelines/distill.py [--recipe NAME | --config FILE] [section.field=value …]

Without arguments: recipe `quickstart` (a student of SmolLM2-135M-Instruct) on an embedded Ray. Run the same command again to
continue an interrupted run; finished stages are skipped. `--help` lists every field.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipelines.config.command_line import read_command_line
from pipelines.config.schema import Config
from pipelines.config.section import ConfigError
from pipelines.log import show_progress
from pipelines.runs.cluster import INTERRUPTED, connected, work_of_run
from pipelines.runs.pipeline import Pipeline
from pipelines.runs.stages import StageError, locked


def distill(config: Config) -> Path:
    """Run the whole pipeline and return the path of its report."""
    started = time.monotonic()
    with locked(config.root, config.recipe), connected(config.root, work_of_run(config)), Pipeline(config) as pipeline:
        prepared = pipeline.prepare()
        teacher = pipeline.teacher(prepared)
        student = None
        for stage in pipeline.student_stages:
            student = pipeline.student(stage, prepared, teacher, previous=student)
        return pipeline.report(prepared, teacher, seconds=time.monotonic() - started)


def main() -> None:
    """Read the command line, run, and turn mistakes into one clear line."""
    show_progress()
    try:
        report = distill(read_command_line(__doc__ or ""))
    except (ConfigError, StageError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    print(f"report  {report}")


if __name__ == "__main__":
    main()
