"""The command: every cell that has no result yet, and the table of all; or interruptions at random moments."""

import argparse
import json
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.chaos.cells import all_cells
from tests.chaos.random_moments import interrupted
from tests.chaos.runs import CACHED, LOG_EVERY, LONGEST_S, MOMENTS, STAGE, Nodes, Run, disk_of, undisturbed
from tests.pipeline_runs import report

MOST_STARTS = 4
TOGETHER = 6
"""Faults that hit one run, where they permit it."""
SETTLE_S = 2.0
"""Steps that were made before a fault are reported until so long after it."""


def main():
    """Run the cells, or the interruptions, that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), help="folder of the results")
    parser.add_argument("--only", default="", help="cells whose names contain all these words")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="interruptions at random moments instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--cached", action="store_true", help="with --random: rollouts are cached, not streamed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended then
    output = options.output.absolute()
    if options.random:
        at_random(options.random, options.seed, CACHED if options.cached else (), output)
        return
    cells = [cell for cell in all_cells() if all(word in cell.name for word in options.only.lower().split())]
    if options.list:
        print(*(cell.name for cell in cells), sep="\n")
        return
    matrix(cells, output)


def matrix(cells, output):
    """Run the cells that have no result, and write the table of all results."""
    (output / "cells").mkdir(parents=True, exist_ok=True)
    reference = undisturbed(output)
    for group in groups([cell for cell in cells if not (output / "cells" / f"{cell.name}.json").is_file()]):
        for cell, result in outcome(group, reference, fresh(output / "runs" / group[0].name)):
            what = {"component": cell.component, "moment": cell.moment, "way": cell.way}
            (output / "cells" / f"{cell.name}.json").write_text(json.dumps(what | result, indent=1))
            print(f"{cell.name}  {summary(result)}", flush=True)
    results = [json.loads(f.read_text()) for f in sorted(output.glob("cells/*.json"))]
    (output / "matrix.md").write_text(table(results))
    recovered = sum(result["same"] for result in results)
    print(json.dumps({"path": str(output / "matrix.md"), "cells": len(results), "recovered": recovered}))


def groups(cells):
    """The cells of each run: up to `TOGETHER`, or one that needs a run of its own."""
    shared = [cell for cell in cells if not cell.alone]
    return [[cell] for cell in cells if cell.alone] + [
        shared[first : first + TOGETHER] for first in range(0, len(shared), TOGETHER)
    ]


def fresh(folder):
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def copied(reference, folder, disk_mb=0, nodes=False, words=()):
    """A run that is not finished, for the time of the block; its disk is removed then, what it said stays."""
    cluster = Nodes() if nodes else None
    try:
        with disk_of(folder, disk_mb) as disk:
            run = Run.copied(reference, disk, folder, cluster, words)
            try:
                yield run
            finally:
                run.end()
    finally:
        if cluster:
            cluster.end()


def outcome(cells, reference, folder):
    """(cell, what became of it) of the cells that hit one run. A cell that fails ends the list: others are to be repeated."""
    results = []
    try:
        with copied(reference, folder, cells[0].disk_mb, cells[0].nodes) as run:
            run.start()
            for cell in cells:
                results.append((cell, {}))
                results[-1] = (cell, disturbed(cell, run, cell is cells[-1]) | {"together": len(cells)})
            same = compared(run, reference)
        return [(cell, facts | same) for cell, facts in results]
    except Exception:
        problem = {"same": False, "problem": traceback.format_exc()[-1500:]}
        unfinished = results[-1:] if results and not results[-1][1] else results or [(cells[0], {})]
        return [(cell, facts | problem) for cell, facts in unfinished]


def disturbed(cell, run, last):
    """Hit a run, and start it again until it has made again what it had made; after the last fault, until it ends well.

    Raises RuntimeError if it does not.
    """
    run.reach(MOMENTS[cell.moment])
    hit_at, recovered_at, again, lines, starts = time.monotonic(), None, 0, [], 1
    named = cell.hit(run)
    time.sleep(SETTLE_S)
    step, known, deadline = run.progress(), len(run.steps()), time.monotonic() + LONGEST_S
    while True:
        code, later = run.process.poll(), run.steps()[known:]
        if recovered_at is None and (code == 0 or (later and max(later) >= step)):
            recovered_at = time.monotonic()
            again = max(0, step - (min(later) - LOG_EVERY)) if later else 0
        if code == 0 or (code is None and recovered_at and not last):
            run.progress()
            warnings = run.warnings() if starts > 1 else []
            if named and not any(named in line for line in warnings):
                raise RuntimeError(f"the damage to {named} was not noticed: {warnings}")
            lines += [line[:400] for line in warnings]
            return {
                "starts": starts,
                "recovery_s": round(recovered_at - hit_at, 1),
                "steps_again": again,
                "lines": lines,
            }
        if code is not None:
            lines.append(f"exit code {code}: {run.complaint() if code > 0 else ''}"[:400])
            if starts == MOST_STARTS:
                raise RuntimeError(f"the run did not recover: {lines}")
            step, known, deadline, recovered_at = run.progress(), 0, time.monotonic() + LONGEST_S, None
            cell.remedy(run)
            run.start()
            starts += 1
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run stands still: {run.said()[-2000:]}")
        time.sleep(0.2)


def compared(run, reference):
    """Whether a run has the weights and the figures of the undisturbed one."""
    mine, theirs = (load_file(path / STAGE / "model.safetensors") for path in (run.path, reference))
    weights = mine.keys() == theirs.keys() and all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    (one, other) = ([{**stage, "path": ""} for stage in report(path)["stages"]] for path in (run.path, reference))
    return {"same": weights and one == other, "same_weights": weights, "same_figures": one == other}


def summary(result):
    """A result in a few words."""
    if "problem" in result:
        return "FAILED: " + result["problem"].splitlines()[-1][:200]
    same = "as undisturbed" if result["same"] else "DIFFERENT"
    return f"{same}, {result['starts']} starts, {result['recovery_s']} s, {result['steps_again']} steps made again"


def table(results):
    """The matrix as a table of Markdown."""
    lines = [
        "| component | moment | way | starts | steps made again | recovery, s | weights and figures | last line |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        same = "as undisturbed" if r["same"] else r.get("problem", "different").splitlines()[-1][:120]
        said = "; ".join(r.get("lines", [])).replace("|", "/")
        figures = f"{r.get('starts', '')} | {r.get('steps_again', '')} | {r.get('recovery_s', '')}"
        lines.append(f"| {r['component']} | {r['moment']} | {r['way']} | {figures} | {same} | {said} |")
    return "\n".join(lines) + "\n"


def at_random(number, seed, words, output):
    """Interrupt runs `number` times in all, and add what became of each run to `random.jsonl`."""
    reference = undisturbed(output, words)
    runs = []
    while (left := number - sum(len(run["interruptions"]) for run in runs)) > 0:
        name = f"seed {seed}, run {len(runs)}{', cached' if words else ''}"
        with copied(
            reference, fresh(output / "random" / name.replace(", ", "-").replace(" ", "-")), words=words
        ) as run:
            runs.append({"run": name} | interrupted(run, left, name) | compared(run, reference))
        with (output / "random.jsonl").open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        print(f"{name}  {len(runs[-1]['interruptions'])} interruptions, same: {runs[-1]['same']}", flush=True)
    same = sum(len(run["interruptions"]) for run in runs if run["same"])
    print(json.dumps({"path": str(output / "random.jsonl"), "runs": len(runs), "interruptions": number, "same": same}))


if __name__ == "__main__":
    main()
