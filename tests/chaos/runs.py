"""Runs of the pipeline that can be watched and hit."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.pipeline_runs import command, distill, environment, hear_interrupts, processes_below, run_command

STEPS = 480
LOG_EVERY = 4
EVERY = 32
"""Steps between the recovery from a fault and the next fault."""
STAGE = "k2"
WORDS = ("--recipe", "smoke", "student.k=2", f"stages.{STAGE}.train.steps={STEPS}", "train.max_failures=20")
CACHED = (f"stages.{STAGE}.rollout.cache=true",)
LONGEST_S = 900
"""Seconds that one start of a run may take. A run that takes longer is ended, and its cell has failed."""


def undisturbed(folder, words=()):
    """The run directory of a run without a fault, made once; its MLflow store and, a folder above, its data lie beside it."""
    run = folder / ("undisturbed-with-words" if words else "undisturbed") / "run"
    if not (run / "report.json").is_file():
        if words:
            shutil.copytree(undisturbed(folder), run, ignore=UNFINISHED, dirs_exist_ok=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        distill(*WORDS, *words, f"output_dir={run}", f"data.cache_dir={folder / 'data'}", cwd=run.parent)
    return run


UNFINISHED = shutil.ignore_patterns("mlflow.json", STAGE, "report.*", ".*")
"""What a copy of a run leaves out, so that its last stage is to be trained."""


@dataclass
class Run:
    """A run whose last stage is not trained yet: a copy of the undisturbed one, with a corpus of its own."""

    folder: Path
    log: Path
    """Folder for what it says."""
    cluster: "Nodes | None" = None
    words: tuple = ()
    process: subprocess.Popen | None = None
    starts: int = 0
    furthest: int = 0
    """The furthest step that was known when `progress` was asked for last."""

    @classmethod
    def copied(cls, reference, folder, log, cluster=None, words=()):
        """A copy of the undisturbed run in a folder, which may be the root of a file system; on a cluster, or alone."""
        shutil.copytree(reference, folder / "run", ignore=UNFINISHED)
        shutil.copytree(reference.parent.parent / "data", folder / "data")
        return cls(folder, log, cluster, words)

    @property
    def path(self):
        """The run directory."""
        return self.folder / "run"

    @property
    def line(self):
        """The command line, the same for each start."""
        places = (f"output_dir={self.path}", f"data.cache_dir={self.folder / 'data'}")
        return command("distill.py", *WORDS, *self.words, *places, *(self.cluster.words if self.cluster else ()))

    def start(self):
        """Start the run."""
        self.starts += 1
        self.out, self.err = self.log / f"out-{self.starts}.txt", self.log / f"err-{self.starts}.txt"
        address = {"RAY_ADDRESS": self.cluster.address} if self.cluster else {}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                self.line, stdout=out, stderr=err, cwd=self.log, env=environment(**address), preexec_fn=hear_interrupts
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

    def progress(self):
        """The furthest step that any start has reported."""
        self.furthest = max([self.furthest, *self.steps()])
        return self.furthest

    def warnings(self):
        """The warnings of the present start."""
        return [line for line in self.err.read_text().splitlines() if line.startswith("warning")]

    def complaint(self):
        """The last line of the present start's errors."""
        lines = [line for line in self.err.read_text().splitlines() if "logging.cc" not in line]
        return lines[-1] if lines else ""

    def wait(self):
        """The exit code of the present start; None if it had to be ended."""
        try:
            return self.process.wait(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def end(self):
        """End what still runs of the present start."""
        if self.process and self.process.poll() is None:
            for pid in (self.process.pid, *processes_below(self.process.pid, "")):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(timeout=60)

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
        self.begin()

    def begin(self):
        """Start the head."""
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

    def lose_head(self):
        """End all processes of the head at once; the other nodes end when they notice."""
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)

    def begin_again(self):
        """A new cluster at another address, with all nodes."""
        self.end()
        self.begin()
        self.grow()

    def end(self):
        """End all nodes."""
        self.cluster.shutdown()


def at_start(run):
    """The train workers exist, and no step has been reported."""
    return len(processes_below(run.process.pid, "ray::RayTrainWorker")) == 2


def training(run):
    """So many steps have been made since the start, or since the recovery from the fault before."""
    return any(step >= run.furthest + EVERY for step in run.steps())


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


def slowed(run):
    """A fault: for 30 seconds, the disk takes writes during 0.2 of each 2 seconds."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        frozen("--freeze", run.folder)
        try:
            time.sleep(1.8)
        finally:
            frozen("--unfreeze", run.folder)
        time.sleep(0.2)


def frozen(change, folder):
    """Let writes to a file system wait, or go on."""
    done = run_command(["fsfreeze", change, str(folder)], "/")
    assert done.returncode == 0, done.stderr


@contextmanager
def disk_of(folder, megabytes):
    """A folder for a run, for the time of the block: a real file system of so many megabytes; 0 for a plain folder."""
    disk, image = folder / "disk", folder / "disk.ext4"
    disk.mkdir()
    try:
        if megabytes:
            image.touch()
            os.truncate(image, megabytes << 20)
            for line in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(disk)]):
                done = run_command(line, "/")
                assert done.returncode == 0, done.stderr
        yield disk
    finally:
        if os.path.ismount(disk):
            run_command(["umount", "-l", str(disk)], "/")
        image.unlink(missing_ok=True)
        shutil.rmtree(disk, ignore_errors=True)
