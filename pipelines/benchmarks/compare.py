"""Recipes and their parts side by side: one teacher, one corpus, equal counted FLOPs, several seeds.

    python -m pipelines.benchmarks.compare [--only "NAME;NAME"] [--seeds N] [--share X] [section.field=value …]
    python -m pipelines.benchmarks.compare --cost        # parameters, FLOPs and bytes of a decoding step; trains nothing

The corpus and the AR teacher are the toy recipe's (trained once, kept in output_dir). Then every variant trains
its stages in a process of one core, rollouts included, until it has spent what the paper's recipe spends up to the
same k, counted by torch's FLOP counter on a real step. Finished (variant, seed) pairs are kept and skipped. Figures are
measured on held-out documents:

  TV        joint total variation to the teacher's samples in hashed buckets, with the floor of two teacher samples and the
            line of independent draws from the teacher's marginals
  entropy   sum of the positions' entropies, against the teacher's
  KL_j      from the teacher's distribution to the student's at offset j, given the teacher's tokens before
  match     same token as the teacher under the same noise, by offset and for the whole block, under both couplings

The table goes to `compare.md`, the figures to `compare.json`, a plot to `compare.png`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pipelines.benchmarks.comparison.figures import teacher_samples
from pipelines.benchmarks.comparison.jobs import budgets_of, job_of, run_all, with_budgets
from pipelines.benchmarks.comparison.report import plot, table
from pipelines.benchmarks.comparison.step_costs import cost_table
from pipelines.benchmarks.comparison.variants import Options, config_of, variants
from pipelines.config.overrides import apply, override
from pipelines.config.recipes import recipe
from pipelines.config.section import ConfigError
from pipelines.config.validation import validate
from pipelines.failures import ending_in_one_line
from pipelines.files import atomic_write, write_json
from pipelines.log import show_progress
from pipelines.runs.cluster import connected, with_lasting_root, work_of_run
from pipelines.runs.pipeline import Pipeline
from pipelines.runs.stages import locked


def run(options: Options) -> dict[str, Any]:
    """Teacher, jobs, table."""
    config = with_lasting_root(apply(override(recipe("paper"), "output_dir", "runs/compare"), {}, options.words))
    validate(config)
    if options.seeds < 1 or options.share <= 0 or options.samples < 1:
        raise ConfigError(
            f"--seeds {options.seeds}, --share {options.share} and --samples {options.samples} must be positive"
        )
    if any(word.startswith("student.k=") for word in options.words):
        raise ConfigError("student.k belongs to the variants here, which compare k = 2, 4 and 8; leave it out")
    known = [v.name for v in variants()]
    for name in options.only or []:
        if name not in known:
            raise ConfigError(f"--only {name}: the variants are {'; '.join(known)}")
    chosen = [v for v in variants() if options.only is None or v.name in options.only or v.name == "paper"]
    for variant in chosen:
        config_of(variant, 0, options)
    with locked(config.root, config.recipe), connected(config.root, work_of_run(config), config.wait_for_nodes_s):
        with Pipeline(config) as pipeline:
            prepared = pipeline.prepare()
            teacher = pipeline.teacher(prepared)
        folders = {name: str(prepared.split(name)) for name in ("train", "heldout")}
        common = {"teacher": str(teacher.folder), "teacher_id": teacher.fingerprint, **folders}
        first = job_of(chosen[0], 0, options, common, config.root)
        import ray

        prepare_samples = ray.remote(num_cpus=1)(teacher_samples).remote(first)
        paper = ray.get(ray.remote(num_cpus=1)(budgets_of).remote(first))
        ray.get(prepare_samples)
        jobs = []
        for variant in chosen:
            for seed in range(options.seeds):
                job = job_of(variant, seed, options, common, config.root)
                jobs.append(job if variant.name == "paper" else with_budgets(job, paper))
        results = run_all(jobs)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["variant"], []).append(result)
    write_json(config.root / "compare.json", by_name)
    text = "\n\n".join(table(by_name, k) for k in (2, 4, 8))
    atomic_write(config.root / "compare.md", text + "\n")
    plot(by_name, config.root / "compare.png")
    print(text)
    return {"path": str(config.root / "compare.json"), "jobs": len(results)}


@ending_in_one_line()
def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="variants, separated by semicolons; the paper's always runs")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each variant (default 1)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the paper recipe's steps to spend (default 1)"
    )
    parser.add_argument("--cost", action="store_true", help="print what a decoding step costs, and nothing else")
    parser.add_argument("words", nargs="*", metavar="section.field=value", help="for every variant")
    parser.add_argument("--samples", type=int, default=16_384, help="blocks drawn after each context (default 16384)")
    given = parser.parse_intermixed_args()
    if given.cost:
        text, record = cost_table()
        print(text)
        print(json.dumps(record))
        return
    show_progress()
    only = given.only.split(";") if given.only else None
    print(json.dumps(run(Options(only, given.seeds, given.share, given.samples, given.words))))


if __name__ == "__main__":
    main()
