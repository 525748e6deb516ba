"""Runs of the pipeline that can be watched and hit."""

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.pipeline_runs import command, distill, environment, hear_interrupts, processes_below, run_command

STEPS = 240
LOG_EVERY = 4
STAGE = "k2"
WORDS = ("--recipe", "smoke", "student.k=2", f"stages.{STAGE}.train.steps={STEPS}")
LONGEST_S = 900
"""Seconds that one start of a run may take. A run that takes longer is ended, and its cell has failed."""


def undisturbed(folder):
    """The run directory of a run without a fault, made once; its data and its MLflow store lie beside it."""
    run = folder / "undisturbed" / "run"
    if not (run / "report.json").is_file():
        run.parent.mkdir(parents=True, exist_ok=True)
        distill(*WORDS, f"output_dir={run}", f"data.cache_dir={folder / 'data'}", cwd=run.parent)
    return run


@dataclass
class Run:
    """A run whose last stage is not trained yet: a copy of the undisturbed one, with a corpus of its own."""

    folder: Path
    cluster: "Nodes | None" = None
    process: subprocess.Popen | None = None
    starts: int = 0

    @classmethod
    def copied(cls, reference, folder, cluster=None):
        """A copy of the undisturbed run in a folder, which may be the root of a file system; on a cluster, or alone."""
        missing = shutil.ignore_patterns("mlflow.json", STAGE, "report.*", ".*")
        shutil.copytree(reference, folder / "run", ignore=missing)
        shutil.copytree(reference.parent.parent / "data", folder / "data")
        return cls(folder, cluster)

    @property
    def path(self):
        """The run directory."""
        return self.folder / "run"

    @property
    def line(self):
        """The command line, the same for each start."""
        places = (f"output_dir={self.path}", f"data.cache_dir={self.folder / 'data'}")
        return command("distill.py", *WORDS, *places, *(self.cluster.words if self.cluster else ()))

    def start(self, log):
        """Start the run; `log` is a folder for what it says."""
        self.starts += 1
        self.out, self.err = log / f"out-{self.starts}.txt", log / f"err-{self.starts}.txt"
        address = {"RAY_ADDRESS": self.cluster.address} if self.cluster else {}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                self.line, stdout=out, stderr=err, cwd=log, env=environment(**address), preexec_fn=hear_interrupts
            )
        if self.cluster and self.starts == 1:
            self.reach(lambda run: "waiting up to" in run.said())
            self.cluster.grow()

    def said(self):
        """What the present start has printed."""
        return self.out.read_text() + self.err.read_text()

    def steps(self):
        """The steps that the present start has reported, in their order."""
        return [int(step) for step in re.findall(rf"{STAGE} +step (\d+)/{STEPS}", self.said())]

    def complaint(self):
        """The last line of the present start's errors."""
        lines = [line for line in self.err.read_text().splitlines() if "logging.cc" not in line]
        return lines[-1] if lines else ""

    def wait(self):
        """The exit code of the present start; None if it had to be ended."""
        try:
            return self.process.wait(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=60)
            return None

    def reach(self, moment):
        """Wait for a moment of the present start. Raises RuntimeError if the start ends, or lasts too long, before."""
        deadline = time.monotonic() + LONGEST_S
        while not moment(self):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the moment was not reached: {self.said()[-2000:]}")
            time.sleep(0.02)


class Nodes:
    """A cluster of real raylets on this machine: a head without CPUs, and a node for each pool once the run waits for it."""

    words = ("stages.k2.train.label=pool=trainers", "stages.k2.rollout.label=pool=rollouts")

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address
        self.nodes = {}

    def grow(self):
        """Add the nodes."""
        for pool in ("trainers", "rollouts"):
            self.add(pool)

    def add(self, pool):
        """Add a node with the label of a pool."""
        memory = 128 << 20
        self.nodes[pool] = self.cluster.add_node(num_cpus=2, labels={"pool": pool}, object_store_memory=memory)

    def lose(self, pool):
        """End all processes of a node at once."""
        self.cluster.remove_node(self.nodes.pop(pool), allow_graceful=False)

    def end(self):
        """End all nodes."""
        self.cluster.shutdown()


def at_start(run):
    """The train workers exist, and no step has been reported."""
    return len(processes_below(run.process.pid, "ray::RayTrainWorker")) == 2


def training(run):
    """Step 40 has been reported."""
    return any(step >= 40 for step in run.steps())


def at_checkpoint(run):
    """A checkpoint is being written: its folder is there without the record that completes it."""
    tags = (run.path / STAGE / "checkpoints").glob("step-*")
    return training(run) and any(not (tag / "latest.json").exists() for tag in tags)


def at_export(run):
    """The last step has been reported."""
    return STEPS in run.steps()


def evaluating(run):
    """The stage is scored."""
    return f"{STAGE}  evaluating" in run.said()


def reporting(run):
    """The report is being written."""
    return "report  continuing prompts" in run.said()


MOMENTS = {
    "start": at_start,
    "training": training,
    "checkpoint": at_checkpoint,
    "export": at_export,
    "evaluation": evaluating,
    "report": reporting,
}


def signalled(title, number, count=1):
    """A fault: a signal to the first `count` processes of a run with this title; an empty title is the driver."""

    def hit(run):
        targets = processes_below(run.process.pid, title) if title else [run.process.pid]
        assert targets, f"no process {title} below {run.process.pid}"
        for pid in targets[:count]:
            os.kill(pid, number)

    return hit


def paused(title, seconds=20):
    """A fault: a process stands still for some seconds, as on a node that swaps."""

    def hit(run):
        pid = processes_below(run.process.pid, title)[0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    return hit


def replaced(pool):
    """A fault: the node of a pool is lost, and 10 seconds later another one joins."""

    def hit(run):
        run.cluster.lose(pool)
        time.sleep(10)
        run.cluster.add(pool)

    return hit


def umount(folder):
    """Take a file system away if one is mounted there."""
    if os.path.ismount(folder):
        run_command(["umount", "-l", str(folder)], "/")
