"""The command: every cell that has no result yet, then the table of all."""

import argparse
import json
import shutil
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.chaos.cells import all_cells
from tests.chaos.runs import LOG_EVERY, LONGEST_S, MOMENTS, STAGE, Nodes, Run, umount, undisturbed
from tests.pipeline_runs import report, run_command

MOST_STARTS = 4


def main():
    """Run the cells that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"), help="folder of the results")
    parser.add_argument("--only", default="", help="cells whose names contain all these words")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    options = parser.parse_args()
    cells = [cell for cell in all_cells() if all(word in cell.name for word in options.only.lower().split())]
    if options.list:
        print(*(cell.name for cell in cells), sep="\n")
        return
    output = options.output.absolute()
    reference = undisturbed(output)
    for number, cell in enumerate(cells, 1):
        folder = output / "cells" / cell.name
        if not (folder / "result.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            what = {"component": cell.component, "moment": cell.moment, "way": cell.way}
            result = what | outcome(cell, reference, folder)
            (folder / "result.json").write_text(json.dumps(result, indent=1))
            print(f"{number}/{len(cells)}  {cell.name}  {summary(result)}", flush=True)
    results = [json.loads(f.read_text()) for f in sorted(output.glob("cells/*/result.json"))]
    (output / "matrix.md").write_text(table(results))
    recovered = sum(result["same"] for result in results)
    print(json.dumps({"path": str(output / "matrix.md"), "cells": len(results), "recovered": recovered}))


def outcome(cell, reference, folder):
    """What became of the run of a cell."""
    disk, cluster = folder / "disk", Nodes() if cell.nodes else None
    disk.mkdir()
    try:
        if cell.disk_mb:
            done = run_command(["mount", "-t", "tmpfs", "-o", f"size={cell.disk_mb}m", "tmpfs", str(disk)], "/")
            assert done.returncode == 0, done.stderr
        run = Run.copied(reference, disk, cluster)
        return disturbed(cell, run, folder) | compared(run, reference)
    except Exception:
        return {"same": False, "problem": traceback.format_exc()[-1500:]}
    finally:
        if cluster:
            cluster.end()
        umount(disk)
        shutil.rmtree(disk, ignore_errors=True)


def disturbed(cell, run, folder):
    """Start a run, hit it, and start it again until it ends well. Raises RuntimeError if it does not."""
    run.start(folder)
    run.reach(MOMENTS[cell.moment])
    before, hit_at, lines = run.steps(), time.monotonic(), []
    cell.hit(run)
    recovery = Recovery(before, hit_at)
    while (code := recovery.watch(run)) != 0:
        lines.append(f"exit code {code}: {run.complaint()}"[:400])
        if run.starts == MOST_STARTS or code is None:
            raise RuntimeError(f"the run did not recover: {lines}")
        cell.remedy(run)
        run.start(folder)
    return {"starts": run.starts, "recovery_s": recovery.seconds, "steps_again": recovery.steps_again, "lines": lines}


class Recovery:
    """When a run is where its fault met it, and how many steps were made again until then.

    Args:
        before: the steps that had been reported.
        hit_at: the time of the fault, by `time.monotonic`.
    """

    def __init__(self, before, hit_at):
        self.known, self.step, self.hit_at = len(before), max(before, default=0), hit_at
        self.seconds, self.steps_again = None, 0

    def watch(self, run):
        """Follow a start to its end and return its exit code; None if it lasted too long."""
        deadline = time.monotonic() + LONGEST_S
        known = self.known if run.starts == 1 else 0
        if run.starts > 1:  # the start before ended, whatever steps it had still made
            self.seconds, self.steps_again = None, 0
        while run.process.poll() is None and time.monotonic() < deadline and self.seconds is None:
            self.look(run.steps()[known:])
            time.sleep(0.2)
        code = run.wait()
        self.look(run.steps()[known:])
        if code == 0 and self.seconds is None:
            self.seconds = round(time.monotonic() - self.hit_at, 1)
        return code

    def look(self, later):
        """Take note of the steps that were reported after the fault."""
        if self.seconds is None and later and max(later) >= self.step:
            self.seconds = round(time.monotonic() - self.hit_at, 1)
            self.steps_again = max(0, self.step - (min(later) - LOG_EVERY))


def compared(run, reference):
    """Whether a run has the weights and the figures of the undisturbed one."""
    mine, theirs = (load_file(path / STAGE / "model.safetensors") for path in (run.path, reference))
    weights = all(torch.equal(mine[name], weight) for name, weight in theirs.items())
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


if __name__ == "__main__":
    main()
