"""Start `pipelines/distill.py` and `pipelines/evaluate.py` as users do, in a process of their own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG_K2 = "stages.k2.train.steps=160"
"""Word of the shared smoke run: its stage k2 takes seconds, in which a test can stop a run."""
FINISHED_WORDS = [
    "--recipe",
    "smoke",
    "output_dir=runs/tiny",
    "data.max_docs=12",
    "data.docs_per_shard=4",
    "data.heldout_fraction=0.3",
    "tokenizer.vocab_size=260",
    "teacher.hidden=16",
    "teacher.layers=1",
    "teacher.heads=2",
    "teacher.mlp=16",
    "teacher.max_positions=64",
    "teacher.train.steps=4",
    "train.steps=4",
    "student.k=2",
    "eval.blocks=8",
    "eval.windows=4",
]
"""The command line of the run in `tests/data/finished_run.tar.gz`."""


def command(script, *words):
    """The command line of a script in `pipelines/`."""
    return [sys.executable, str(ROOT / "pipelines" / script), *words]


def environment(**extra):
    """This process's environment without its settings of Ray and MLflow, and without network access to the hub."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return {**clean, "HF_HUB_OFFLINE": "1", **extra}


def hear_interrupts():
    """A shell lets its background jobs ignore SIGINT, and their children inherit that; a run in a terminal hears it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(line, cwd, timeout=600, **extra):
    """The finished process of a command line, whatever its exit code."""
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment(**extra), timeout=timeout)


def distill(*words, cwd, **extra):
    """The finished process of a run of the pipeline that must succeed."""
    done = run_command(command("distill.py", *words), cwd, timeout=2100, **extra)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def report(run):
    """The report of a run directory."""
    return json.loads((run / "report.json").read_text())


def copy_of(run, folder, *without):
    """A copy of a run directory that shares no file and no MLflow run with it."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("mlflow.json", *without))
    return folder


def copy_with_tracking(run, folder):
    """A copy of a run directory with the data and the MLflow store beside it, and its MLflow runs in that store."""
    shutil.copytree(run.parent, folder / "runs")
    copy = folder / "runs" / run.name
    state = copy / "mlflow.json"
    state.write_text(state.read_text().replace(str(run.parent), str(copy.parent)))
    return copy


def processes_below(pid, title):
    """Ids of the processes below another one whose command line contains a text; Ray names its workers."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if title in (folder / "cmdline").read_text().replace("\0", " "):
                found.append(int(folder.name))

    def is_below(child):
        return child in parents and (parents[child] == pid or is_below(parents[child]))

    return sorted(filter(is_below, found))


def unpack_finished_run(folder):
    """The run directory of the tiny run that an earlier release finished, with its data beside it."""
    with tarfile.open(ROOT / "tests" / "data" / "finished_run.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "runs" / "tiny"
