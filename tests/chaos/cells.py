"""The cells of the fault matrix."""

import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.runs import STAGE, paused, replaced, signalled
from tests.pipeline_runs import processes_below, run_command


def nothing(run):
    """No remedy is needed."""


@dataclass(frozen=True)
class Cell:
    """A fault, and what an operator does about it before the next start."""

    component: str
    moment: str
    way: str
    hit: Callable
    remedy: Callable = nothing
    disk_mb: int = 0
    """Size of a file system of its own for the run; 0 for none."""
    nodes: bool = False
    """Whether the run is on a cluster of several nodes, which begins without any."""

    @property
    def name(self):
        """The name of the cell, also of its folder."""
        return re.sub("[^a-z0-9.]+", "-", f"{self.component} {self.moment} {self.way}".lower())


def killed_then(change):
    """A fault: the driver is killed, and what it left is changed."""

    def hit(run):
        signalled("", signal.SIGKILL)(run)
        run.process.wait(timeout=60)
        change(run)

    return hit


def latest_checkpoint(run):
    """The folder of the newest checkpoint."""
    return max((run.path / STAGE / "checkpoints").glob("step-*/latest.json")).parent


def cut(find):
    """A change: the file loses its second half."""

    def change(run):
        file = find(run)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return change


def emptied(find):
    """A change: the file has no byte left."""
    return lambda run: find(run).write_bytes(b"")


def flipped(find):
    """A change: one bit in the middle of the file is another."""

    def change(run):
        file = find(run)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return change


def in_run(*names):
    """Finds a file of the run directory."""
    return lambda run: run.path.joinpath(*names)


def in_checkpoint(pattern):
    """Finds a file of the newest checkpoint."""
    return lambda run: max(latest_checkpoint(run).glob(pattern))


def shard(run):
    """A file of the corpus."""
    return min((run.folder / "data").rglob("*.parquet"))


def filled(run):
    """A fault: nothing more fits on the disk."""
    with (run.folder / "filler").open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


def emptied_disk(run):
    """The remedy: there is room again."""
    (run.folder / "filler").unlink()


def remounted(mode):
    """Mount the disk of the run again, read-only or writable."""

    def change(run):
        done = run_command(["mount", "-o", f"remount,{mode}", str(run.folder)], "/")
        assert done.returncode == 0, done.stderr

    return change


def out_of_memory(title):
    """A fault: a process gets no more memory than it has, so its next large allocation fails."""

    def hit(run):
        pid = processes_below(run.process.pid, title)[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))

    return hit


def without_folder(*names):
    """A change: a folder is gone."""
    return lambda run: shutil.rmtree(run.path.joinpath(*names))


COMPONENTS = {
    "driver": "",
    "train controller": "ray::TrainController",
    "train worker": "ray::RayTrainWorker",
    "rollout actor": "ray::MapWorker(MapBatches(Rollouts))",
    "split coordinator": "ray::SplitCoordinator",
    "dataset manager": "ray::DatasetManager",
    "relay of metrics": "ray::Relay",
    "evaluation actor": "ray::MapWorker(MapBatches(EvalActor))",
    "autoscaling coordinator": "ray::_AutoscalingCoordinatorActor",
    "raylet": "raylet/raylet",
    "GCS": "gcs/gcs_server",
}
KILLS = {
    "start": ("driver", "train controller", "train worker", "dataset manager", "raylet"),
    "training": tuple(name for name in COMPONENTS if name != "evaluation actor"),
    "checkpoint": ("driver", "train worker"),
    "export": ("driver", "train worker"),
    "evaluation": ("driver", "evaluation actor"),
    "report": ("driver",),
}
DAMAGES = {"cut": cut, "empty": emptied, "with one bit changed": flipped}
FILES = {
    "newest checkpoint, its record": (in_checkpoint("latest.json"), ("cut",)),
    "newest checkpoint, model": (in_checkpoint("*model_states.pt"), ("cut", "with one bit changed")),
    "newest checkpoint, optimiser": (in_checkpoint("*optim_states.pt"), ("cut", "with one bit changed")),
    "newest checkpoint, moving average": (in_checkpoint("average-0.safetensors"), ("cut", "with one bit changed")),
    "record of the newest checkpoint": (in_run(STAGE, "checkpoints", "latest.json"), ("cut", "empty")),
    "corpus": (shard, ("cut", "with one bit changed")),
    "run.json": (in_run("run.json"), ("cut", "empty")),
    "log.jsonl": (in_run("log.jsonl"), ("cut",)),
    "teacher's manifest": (in_run("teacher", "manifest.json"), ("cut", "empty")),
}


def all_cells():
    """Every cell of the matrix."""
    cells = [
        Cell(name, moment, "SIGKILL", signalled(COMPONENTS[name], signal.SIGKILL))
        for moment, names in KILLS.items()
        for name in names
    ]
    cells += [
        Cell("both train workers", "training", "SIGKILL", signalled("ray::RayTrainWorker", signal.SIGKILL, count=2)),
        Cell("driver", "training", "SIGTERM", signalled("", signal.SIGTERM)),
        Cell("driver", "training", "SIGINT", signalled("", signal.SIGINT)),
        Cell("driver", "evaluation", "SIGINT", signalled("", signal.SIGINT)),
        Cell("train worker", "training", "20 s standstill", paused("ray::RayTrainWorker")),
        Cell("rollout actor", "training", "20 s standstill", paused(COMPONENTS["rollout actor"])),
        Cell("train worker", "training", "out of memory", out_of_memory("ray::RayTrainWorker")),
        Cell("rollout actor", "training", "out of memory", out_of_memory(COMPONENTS["rollout actor"])),
        Cell("disk", "training", "full", filled, emptied_disk, disk_mb=64),
        Cell("disk", "evaluation", "full", filled, emptied_disk, disk_mb=64),
        Cell("disk", "training", "read-only", remounted("ro"), remounted("rw"), disk_mb=64),
    ]
    cells += [
        Cell(name, "training", f"file {damage}", killed_then(DAMAGES[damage](find)))
        for name, (find, damages) in FILES.items()
        for damage in damages
    ]
    cells += [
        Cell(f"node of the {pool}", "training", "lost, another joins", replaced(pool), nodes=True)
        for pool in ("trainers", "rollouts")
    ]
    cells.append(Cell("checkpoints", "training", "folder gone", killed_then(without_folder(STAGE, "checkpoints"))))
    return cells
